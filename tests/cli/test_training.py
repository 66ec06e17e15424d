"""`vfmtok train`, the trainers as scripts, and `vfmtok plot`: help, and mistakes in one line."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vfmtok_hf import cli


@pytest.mark.parametrize(("trainer", "argument"), [("tokenizer", "--lpips_weight"), ("generator", "--lora_rank")])
def test_help_is_the_trainers(trainer, argument):
    result = CliRunner().invoke(cli.app, ["train", trainer, "--help"])
    assert result.exit_code == 0
    assert f"usage: vfmtok train {trainer} [--config FILE]" in result.output
    assert argument in result.output


MISTAKES = [
    (["--output", "run"], "Missing --train_data"),
    (["--train_data", "images", "--output", "run", "--learning_rte", "1"], "Did you mean --learning_rate or"),
    (["--train_data", "no/such", "--output", "run", "--init_from=no/such/model"], "no/such"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
@pytest.mark.parametrize("trainer", ["tokenizer", "generator"])
def test_mistakes_are_one_line(trainer, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["train", trainer, *argv])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("trainer", ["tokenizer", "generator"])
def test_a_run_is_not_overwritten(trainer, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    argv = ["--train_data", str(tmp_path), "--output", str(tmp_path / "run"), "--init_from", str(tmp_path)]
    result = CliRunner().invoke(cli.app, ["train", trainer, *argv])
    assert result.exit_code == 1
    assert "run already contains a run: pass --resume true" in result.output


@pytest.mark.process
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--class_names", "no.json"], "There is no file no.json."),
        (["--lpips_weight", "1", "--vgg_weights", "no.pth"], "There is no file no.pth."),
        (
            ["--adversarial_weight", "1", "--discriminator", "dino", "--discriminator_model", "./no"],
            "There is no model folder ./no.",
        ),
        (["--output", "run", "--resume", "--batch_size", "4"], "A resumed run must use the same arguments"),
    ],
)
def test_paths_and_arguments_of_a_resumed_run_are_checked_before_heavy_imports(argv, message, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "run" / "arguments.yaml").write_text("batch_size: 8\n")
    code = (
        "import sys; from vfmtok_hf.training.train_tokenizer import main; heavy = {'torch', 'transformers', 'datasets'}\n"
        "try: main()\nfinally: print(heavy & sys.modules.keys())"
    )
    required = ["--train_data", ".", "--output", "new", "--init_from", "."]
    done = subprocess.run([sys.executable, "-c", code, *required, *argv], capture_output=True, text=True, cwd=tmp_path)
    assert message in done.stderr
    assert done.stdout == "set()\n"


@pytest.mark.process
@pytest.mark.parametrize("script", ["train_tokenizer", "train_generator", "extract_tokens"])
def test_scripts_end_with_one_line_too_before_heavy_imports(script, tmp_path):
    code = (
        "import atexit, runpy, sys; heavy = {'torch', 'transformers', 'datasets'}; "
        "atexit.register(lambda: print(heavy & sys.modules.keys())); "
        f"runpy.run_module('vfmtok_hf.training.{script}', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "--output", "run", "--train_dta", "images"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Unknown argument --train_dta.")
    assert done.stderr.count("\n") == 1
    assert done.stdout == "set()\n"


@pytest.mark.process
def test_without_accelerate_curves_are_plotted_and_trainers_name_the_extra(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1, "time": 0, "loss": 2.5}\n')
    code = "import sys; sys.modules['accelerate'] = None; from vfmtok_hf.cli import app; app(sys.argv[1:])"

    def without_accelerate(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    plotted = without_accelerate("plot", str(tmp_path))
    assert plotted.returncode == 0, plotted.stderr
    assert (tmp_path / "curves.png").is_file()
    refused = without_accelerate("train", "generator", "--output", "run", "--train_data", ".", "--tokenizer", ".")
    assert refused.returncode == 1
    assert "accelerate" in refused.stderr
    assert 'pip install "vfmtok-hf[train]"' in refused.stderr
    assert "Traceback" not in refused.stderr
