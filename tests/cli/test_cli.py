"""The `vfmtok` command, with tiny checkpoints."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

import vfmtok_hf
from tests.pipelines.tiny_pipeline import ID2LABEL, tiny_dit_pipeline, tiny_pipeline
from vfmtok_hf import cli, conversion
from vfmtok_hf.cli import environment, options
from vfmtok_hf.cpu import threads as cpu_threads
from vfmtok_hf.data.token_files import load_tokens
from vfmtok_hf.data.token_sets import TokenSet


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind in ("ar", "rar"):
        tiny_pipeline(kind).save_pretrained(folder / kind)
    return folder


@pytest.fixture
def model(checkpoints, monkeypatch):
    monkeypatch.setattr(vfmtok_hf, "DEFAULT_CHECKPOINT", str(checkpoints / "ar"))
    return str(checkpoints / "ar")


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png"):
        PIL.Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    return folder


def vfmtok(*arguments, code=0):
    """Run the command; returns (stdout, stderr)."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def pixels(path):
    return np.asarray(PIL.Image.open(path))


# -- generate


@pytest.mark.parametrize(
    "labels",
    [
        ["--labels", "smiley", "heart"],
        ["--labels", "smiley", "--labels", "heart"],
        ["-l", "smiley", "1"],
        ["--labels=0", "heart"],
    ],
)
def test_labels_take_several_words(model, tmp_path, labels):
    vfmtok("generate", *labels, "--seed", 0, "--output", tmp_path / "images")
    assert sorted(os.listdir(tmp_path / "images")) == ["00000-smiley.png", "00001-heart.png"]


@pytest.mark.parametrize(("limit", "threads"), [(0, 2), (10**9, 1)])
def test_small_models_run_on_one_thread(model, tmp_path, monkeypatch, limit, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_threads, "SMALL", limit)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        vfmtok("generate", "--labels", "smiley", "--output", tmp_path / "grid.png")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_labels_come_in_any_place(model, tmp_path):
    vfmtok("generate", "--seed", 0, "--labels", "smiley", "red panda", "--output", tmp_path / "images", "-n", 2)
    names = ["00000-smiley.png", "00001-smiley.png", "00002-Red-Panda.png", "00003-Red-Panda.png"]
    assert sorted(os.listdir(tmp_path / "images")) == names


@pytest.mark.parametrize(
    "words", [["smiley", "heart"], ["--seed", 0, "smiley", "heart"], ["smiley", "--labels", "heart"]]
)
def test_labels_are_arguments_too(model, tmp_path, words):
    vfmtok("generate", *words, "--output", tmp_path / "images")
    assert sorted(os.listdir(tmp_path / "images")) == ["00000-smiley.png", "00001-heart.png"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", 0, "--top-k 1 takes the most probable token"),
        ("--temperature", "nan", "must be above 0"),
        ("--top-p", 0, "must be above 0 and at most 1"),
        ("--top-k", -1, "0"),
        ("--guidance-scale", -1, "must be 1 (none) or larger"),
        ("--seed", 2**63, str(2**63 - 1)),
    ],
)
def test_settings_are_refused_in_the_words_of_the_command(option, value, message):
    _, stderr = vfmtok("generate", option, value, "--model", "./absent", code=2)
    assert option in stderr
    assert message in " ".join(re.sub(r"[│\n]", " ", stderr).split())


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "heart"],
        ["extract-tokens", "."],
        ["evaluate", "generation", "--reference", "."],
        ["evaluate", "tokens", "."],
        ["export"],
        ["convert", "ar", "--checkpoint", "x"],
    ],
    ids=" ".join,
)
def test_an_empty_output_is_not_the_current_folder(command):
    _, stderr = vfmtok(*command, "--output", "", code=2)
    assert "is empty: pass a file or a folder" in stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"_class_name": "PixArtTransformer2DModel"}', "is not a VFMTok pipeline: .*config.json has no num_classes"),
        ('{"num_classes": 5,', "config.json is damaged"),
    ],
)
def test_pipelines_that_are_none(config, message, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(config)
    for command in (["generate", "heart"], ["info", "--labels"]):
        _, stderr = vfmtok(*command, "--model", tmp_path, code=1)
        assert re.match(f"Error: .*{message}", stderr)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16"])
def test_precisions_have_short_names(model, tmp_path, dtype):
    vfmtok("generate", "heart", "--dtype", dtype, "--output", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").exists()


def test_images_come_in_any_size(model, tmp_path):
    vfmtok("generate", "heart", "--size", 48, "--output", tmp_path / "images")
    assert pixels(tmp_path / "images" / "00000-heart.png").shape == (48, 48, 3)


def test_inpainting_keeps_to_the_mask(checkpoints, photographs, tmp_path):
    mask = tmp_path / "mask.png"
    PIL.Image.fromarray(np.pad(np.full((40, 20), 255, np.uint8), ((0, 0), (0, 30)))).save(mask)
    arguments = ["inpaint", photographs / "a.png", "heart", "--mask", mask, "-n", 2, "-o", tmp_path / "images"]
    vfmtok(*arguments, "--model", checkpoints / "rar")
    assert sorted(os.listdir(tmp_path / "images")) == ["00000.png", "00001.png"]
    _, stderr = vfmtok(*arguments, "--model", checkpoints / "ar", code=1)
    assert "RAR" in stderr
    for wrong in ([photographs / "none.png", "heart"], [photographs / "a.png", "hart"]):
        _, stderr = vfmtok("inpaint", *wrong, "--mask", mask, "--model", checkpoints / "rar", code=1)
        assert "none.png" in stderr or "Did you mean 'heart'?" in stderr


def test_a_grid_is_the_default(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = vfmtok("generate", "--labels", "smiley", "heart")
    assert re.fullmatch(r"2 images in [\d.]+ s: grid.png\n", stdout)
    assert stderr == ""
    assert os.listdir(tmp_path) == ["grid.png"]


def test_without_labels_there_is_one_image_of_each_class(model, tmp_path):
    vfmtok("generate", "--output", tmp_path / "images")
    assert len(os.listdir(tmp_path / "images")) == len(ID2LABEL)


@pytest.mark.parametrize("kind", ["ar", "rar"])
def test_a_seed_gives_the_same_images_whatever_the_batch_size(checkpoints, tmp_path, kind):
    for batch_size in (1, 3, 16):
        vfmtok(
            "generate", "--model", checkpoints / kind, "--seed", 5, "--batch-size", batch_size,
            "--guidance-scale", 2, "--temperature", 0.9, "--top-k", 40, "--top-p", 0.95,
            "--output", tmp_path / str(batch_size),
        )  # fmt: skip
    for name in os.listdir(tmp_path / "16"):
        for batch_size in (1, 3):
            difference = pixels(tmp_path / "16" / name).astype(int) - pixels(tmp_path / str(batch_size) / name)
            assert np.abs(difference).max() <= 1  # the tokens are equal; convolutions round differently in batches


def test_image_i_is_drawn_from_seed_plus_i(model, tmp_path):
    vfmtok("generate", "-l", "heart", "heart", "--seed", 7, "-o", tmp_path / "both")
    vfmtok("generate", "-l", "heart", "--seed", 8, "-o", tmp_path / "second")
    both, second = pixels(tmp_path / "both/00001-heart.png"), pixels(tmp_path / "second/00000-heart.png")
    assert np.abs(both.astype(int) - second).max() <= 1
    assert (both != pixels(tmp_path / "both/00000-heart.png")).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "hart"], "There is no class 'hart'. Did you mean 'heart'?"),
        (["--labels", "77"], "Class labels must be in 0 to 4, got 77."),
        (["none of these"], "The 5 classes are smiley, heart, crane, crane, Red Panda."),
        (["--model", "./absent"], "There is no model folder ./absent."),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = vfmtok("generate", *arguments, code=1)
    assert stdout == ""
    assert stderr.startswith("Error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["generate", "tokenize", "detokenize", "reconstruct"])
def test_unwritable_output_is_found_before_the_model_is_loaded(tmp_path, photographs, command):
    (tmp_path / "file").write_text("")
    inputs = {"generate": [], "detokenize": [tmp_path / "tokens.npy"]}.get(command, [photographs])
    output = tmp_path / "file" / ("tokens.npy" if command == "tokenize" else "grid.png")
    _, stderr = vfmtok(command, *inputs, "--output", output, "--model", "./absent", code=1)
    assert "is a file, not a folder" in stderr


def test_wrong_usage_has_its_own_code(model):
    vfmtok("generate", "--batch-size", 0, code=2)
    vfmtok("generate", "--bogus", code=2)
    vfmtok("draw", code=2)


# -- tokens


@pytest.mark.parametrize("suffix", ["safetensors", "npy"])
def test_tokenize_then_detokenize_is_reconstruct(model, photographs, tmp_path, suffix):
    tokens = tmp_path / f"tokens.{suffix}"
    stdout, _ = vfmtok("tokenize", photographs, "--output", tokens, "--batch-size", 2)
    assert re.fullmatch(rf"3 tokenized images in [\d.]+ s: {re.escape(str(tokens))}\n", stdout)
    names, image_tokens = load_tokens(tokens)
    assert names == ["a.png", "b.jpg", "c.png"]
    pipe = vfmtok_hf.VFMTokPipeline.from_pretrained(model)
    assert torch.equal(image_tokens, pipe.tokenize([photographs / name for name in names]))

    vfmtok("detokenize", tokens, "--output", tmp_path / "images", "--batch-size", 2)
    assert sorted(os.listdir(tmp_path / "images")) == ["a.png", "b.jpg.png", "c.png"]
    expected = np.asarray(pipe.reconstruct(photographs / "a.png").images[0]).astype(int)
    assert np.abs(pixels(tmp_path / "images" / "a.png") - expected).max() <= 1
    vfmtok("detokenize", tokens, "--output", tmp_path / "grid.png", "--size", 20)
    assert (tmp_path / "grid.png").exists()


def test_tokenize_stops_at_a_damaged_image_or_skips_it(model, photographs, tmp_path):
    (photographs / "bad.png").write_text("no image")
    _, stderr = vfmtok("tokenize", photographs, "-o", tmp_path / "tokens.npy", code=1)
    assert "bad.png" in stderr
    assert os.listdir(tmp_path) == ["photographs"]
    stdout, stderr = vfmtok("tokenize", photographs, "-o", tmp_path / "tokens.npy", "--skip-errors")
    assert stdout.startswith("3 tokenized images")
    assert stderr.startswith("Skipped: ")
    _, stderr = vfmtok("tokenize", photographs / "bad.png", "-o", tmp_path / "none.npy", "--skip-errors", code=1)
    assert "None of the images can be used" in stderr


@pytest.mark.parametrize("command", ["detokenize", "reconstruct"])
def test_two_images_that_would_become_one_file_are_refused_first(model, photographs, tmp_path, command):
    shutil.copy(photographs / "a.png", photographs / "b.jpg.png")  # as b.jpg is named once it is decoded
    vfmtok("tokenize", photographs, "-o", tmp_path / "tokens.parquet")
    source = photographs if command == "reconstruct" else tmp_path / "tokens.parquet"
    _, stderr = vfmtok(command, source, "-o", tmp_path / "images", code=1)
    assert "'b.jpg' and 'b.jpg.png' would both be written to b.jpg.png" in stderr
    assert not (tmp_path / "images").exists()


def test_tokens_as_a_data_set_are_those_of_other_files(model, photographs, tmp_path):
    for suffix in (".safetensors", ".parquet"):
        vfmtok("tokenize", photographs, "-o", tmp_path / f"tokens{suffix}")
    (names, tokens), (other_names, other_tokens) = map(load_tokens, sorted(tmp_path.glob("tokens.*")))
    assert names == other_names
    assert torch.equal(tokens, other_tokens)
    vfmtok("detokenize", tmp_path / "tokens.parquet", "-o", tmp_path / "images")
    assert len(os.listdir(tmp_path / "images")) == 3


def test_token_files_of_another_kind_are_refused_first(model, photographs, tmp_path):
    _, stderr = vfmtok("tokenize", photographs, "-o", tmp_path / "tokens.pt", code=1)
    assert "end in .safetensors or .npy or .parquet" in stderr
    np.save(tmp_path / "long.npy", np.zeros((1, 10), dtype=np.int32))
    _, stderr = vfmtok("detokenize", tmp_path / "long.npy", "-o", tmp_path / "images", code=1)
    assert "9 tokens per image, got 10" in stderr


def test_extract_tokens_for_training(model, photographs, tmp_path):
    (photographs / "bad.png").write_bytes(b"no image")
    (tmp_path / "data").mkdir()
    photographs = photographs.rename(tmp_path / "data" / "photographs")
    command = [
        "extract-tokens",
        tmp_path / "data",
        "-o",
        tmp_path / "tokens",
        "--crops",
        "center",
        "--no-horizontal-flip",
    ]
    stdout, stderr = vfmtok(*command)
    assert re.fullmatch(rf"3 tokenized images in [\d.]+ s: {re.escape(str(tmp_path / 'tokens'))}\n", stdout)
    assert "Skipped: " in stderr
    assert "bad.png" in stderr
    shards = TokenSet(tmp_path / "tokens")
    assert (len(shards.dataset), shards.class_names) == (3, ["photographs"])
    _, stderr = vfmtok(*command, "--seed", 1, code=1)
    assert "choose another --output" in stderr


def test_an_image_tokenizer_alone_will_do(model, photographs, tmp_path):
    pipe = vfmtok_hf.VFMTokPipeline.from_pretrained(model)
    for part in (pipe.vq_model, pipe.image_processor):
        part.save_pretrained(tmp_path / "tokenizer")
    vfmtok("tokenize", photographs, "-m", tmp_path / "tokenizer", "-o", tmp_path / "tokens.npy")
    assert torch.equal(load_tokens(tmp_path / "tokens.npy")[1], pipe.tokenize(sorted(photographs.iterdir())))
    vfmtok("detokenize", tmp_path / "tokens.npy", "-m", tmp_path / "tokenizer", "-o", tmp_path / "images")
    _, stderr = vfmtok("generate", "-m", tmp_path / "tokenizer", "-o", tmp_path / "images", code=1)
    assert "model_index.json" in stderr


def test_a_light_tokenizer_decodes_and_asks_for_its_vision_model(model, photographs, tmp_path):
    pipe = vfmtok_hf.VFMTokPipeline.from_pretrained(model)
    tokens = tmp_path / "tokens.npy"
    vfmtok("tokenize", photographs, "-o", tokens)
    light, vision_folder = tmp_path / "light", tmp_path / "vision"
    pipe.vq_model.vision_model.save_pretrained(vision_folder)
    state_dict = {k: v for k, v in pipe.vq_model.state_dict().items() if not k.startswith("vision_model.")}
    for name_or_path, code in ((None, 1), (str(vision_folder), 0)):
        pipe.vq_model.config.update({"save_vision_model": False, "vision_model_name_or_path": name_or_path})
        pipe.vq_model.save_pretrained(light, state_dict=state_dict)
        pipe.image_processor.save_pretrained(light)
        vfmtok("detokenize", tokens, "-m", light, "-o", tmp_path / "images")
        _, stderr = vfmtok("tokenize", photographs, "-m", light, "-o", tmp_path / "light.npy", code=code)
        assert ("load_vision_model" in stderr) == bool(code)
    assert torch.equal(load_tokens(tmp_path / "light.npy")[1], load_tokens(tokens)[1])


def test_damaged_checkpoints_are_one_line(model, tmp_path):
    shutil.copytree(model, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "vq_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    _, stderr = vfmtok("generate", "-m", tmp_path / "damaged", "-o", tmp_path / "grid.png", code=1)
    assert "damaged or truncated weights file" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "grid.png").exists()


def test_reconstruct_shows_pairs_and_their_psnr(model, photographs, tmp_path):
    stdout, _ = vfmtok("reconstruct", photographs, "--output", tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").exists()
    for name in ("a.png", "b.jpg", "c.png", "mean"):
        assert name in stdout
    vfmtok("reconstruct", photographs / "a.png", "--output", tmp_path / "pairs")
    assert os.listdir(tmp_path / "pairs") == ["a.png"]


@pytest.fixture(scope="module")
def continuous(tmp_path_factory):
    """A pipeline of a continuous autoencoder, and in `alone` the autoencoder."""
    folder = tmp_path_factory.mktemp("continuous")
    pipe = tiny_dit_pipeline()
    pipe.save_pretrained(folder / "pipe")
    for part in (pipe.vae, pipe.image_processor):
        part.save_pretrained(folder / "alone")
    return folder


@pytest.mark.parametrize("name", ["pipe", "alone"])
def test_reconstruct_by_a_continuous_autoencoder(continuous, name, photographs, tmp_path):
    stdout, _ = vfmtok("reconstruct", photographs, "-m", continuous / name, "--output", tmp_path / "pairs")
    assert sorted(os.listdir(tmp_path / "pairs")) == ["a.png", "b.jpg.png", "c.png"]
    assert "mean" in stdout
    _, stderr = vfmtok("tokenize", photographs, "-m", continuous / name, "-o", tmp_path / "tokens.npy", code=1)
    assert re.search("of type 'vfmae', not 'vfmtok'|VFMTokDiTPipeline, not a VFMTokPipeline", stderr)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "pipe",
            ["VFMTokDiTForImageGeneration, 2 layers of width 16 and 1 of width 24", "4 x 3 x 3 continuous values"],
        ),
        ("alone", ["4 x 3 x 3 continuous values", "dinov2_with_registers"]),
    ],
)
def test_info_of_a_continuous_autoencoder(continuous, name, facts):
    stdout, _ = vfmtok("info", "-m", continuous / name)
    for fact in facts:
        assert fact in stdout


# -- convert and info


def test_convert_hands_everything_to_the_library(tmp_path, monkeypatch):
    calls = {}

    class Report:
        def summary(self):
            return "what happened"

    for kind in ("tokenizer", "ar", "rar", "vfmae", "dit"):
        function = f"convert_{kind}"
        monkeypatch.setattr(conversion, function, lambda *a, kind=kind: calls.update({kind: a}) or Report())
    checkpoint, output, config = (tmp_path / name for name in ("original.pt", "converted", "config.json"))
    checkpoint.touch()
    options = ["--checkpoint", checkpoint, "--output", output, "--weights", "model", "--config", config, "--dry-run"]
    for kind in ("ar", "rar", "dit"):
        assert vfmtok("convert", kind, *options)[0] == "what happened\n"
        assert calls[kind] == (checkpoint, output, "model", config, True, False)
    vfmtok("convert", "tokenizer", *options, "--vision-model", "facebook/model", "--overwrite")
    assert calls["tokenizer"] == (checkpoint, output, None, "facebook/model", "model", config, True, True)
    vfmtok("convert", "vfmae", *options, "--latent-statistics", tmp_path / "stats.pt")
    assert calls["vfmae"] == (checkpoint, output, None, None, tmp_path / "stats.pt", "model", config, True, False)


def test_convert_reports_a_missing_checkpoint(tmp_path):
    _, stderr = vfmtok("convert", "ar", "--checkpoint", tmp_path / "absent.pt", "-o", tmp_path / "out", code=1)
    assert "absent.pt" in stderr
    assert stderr.count("\n") == 1
    vfmtok("convert", "ar", "--output", tmp_path / "out", code=2)


@pytest.mark.parametrize("kind", ["tokenizer", "vfmae", "ar", "rar", "dit"])
def test_a_conversion_does_not_replace_its_checkpoint(kind, tmp_path):
    checkpoint = tmp_path / "out" / "original.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    options = ["--checkpoint", checkpoint, "--output", checkpoint.parent, "--overwrite"]
    assert "contains the checkpoint" in vfmtok("convert", kind, *options, code=1)[1]
    assert checkpoint.exists()


def test_info(model, monkeypatch):
    monkeypatch.setattr(environment, "is_bfloat16_faster", lambda rows: rows == 1)
    monkeypatch.setattr(environment, "default_device", lambda: torch.device("cpu"))
    stdout, _ = vfmtok("info")
    for fact in (
        vfmtok_hf.__version__,
        torch.__version__.split("+")[0],
        "deformable attention",
        "32 x 32 pixels",
        "VFMTokARForImage",
        "bfloat16 to generate one image, float32 to generate 8 images, float32 to encode, decode and train",
        model,
    ):
        assert fact in stdout


def test_info_lists_the_labels(model):
    stdout, stderr = vfmtok("info", "--labels")
    assert stdout.splitlines() == [f"{number}  {name}" for number, name in ID2LABEL.items()]
    assert stderr == ""


def test_version():
    assert vfmtok("--version")[0] == f"vfmtok-hf {vfmtok_hf.__version__}\n"


def test_a_push_names_a_namespace(model):
    _, stderr = vfmtok("push", model, "mine", "--dry-run", code=1)
    assert "you/mine" in stderr


def test_progress_fits_a_log(monkeypatch, capsys):
    monkeypatch.setattr(options, "LOG_INTERVAL", 0)
    with options.progress("Generating", 4) as progress_callback:
        progress_callback(1)
        progress_callback(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("),")[0] for line in lines] == ["Generating: 1 of 4 (25%", "Generating: 4 of 4 (100%"]


MISTAKES = [
    ["generate", "hart"],
    ["generate", "heart", "--output", "file/grid.png"],
    ["generate", "heart", "--output", "grid.gif"],
    ["tokenize", "absent/"],
    ["tokenize", ".", "--output", "tokens.txt"],
    ["detokenize", "absent.npy"],
    ["reconstruct", "absent.png"],
    ["convert", "ar", "--checkpoint", "absent.pt", "--output", "converted"],
    ["inpaint", "absent.png", "heart", "--mask", "absent.png"],
    ["push", "absent", "you/mine"],
    ["evaluate", "reconstruction", "absent/"],
    ["evaluate", "generation", "--reference", "x.npz", "--output", "file/samples"],
    ["evaluate", "tokens", "absent.png"],
    ["extract-tokens", ".", "--output", "file/tokens"],
    ["extract-tokens", "./absent", "--output", "tokens"],
    ["train", "generator", "--output", "run"],
    ["train", "generator", "--train_data", "./absent", "--output", "run", "--tokenizer", "."],
    ["train", "tokenizer", "--train_data", ".", "--output", "run", "--learning_rte", "1"],
    ["train", "tokenizer", "--train_data", ".", "--output", "run", "--init_from", "./absent"],
]


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_mistakes_wait_for_no_heavy_library(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    code = (
        "import atexit, sys; from vfmtok_hf.cli import app; "
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules})); app(sys.argv[1:])"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    loaded = run.stdout.split()
    assert run.returncode == 1
    assert run.stderr.startswith("Error: ")
    assert not set(loaded) & {"torch", "torchvision", "transformers", "diffusers", "datasets"}


def test_help_names_every_command():
    stdout, _ = vfmtok("--help")
    for command in ("generate", "tokenize", "detokenize", "reconstruct", "convert", "info", "evaluate"):
        assert command in stdout
        vfmtok(command, "--help")


def test_help_waits_for_no_heavy_library():
    """Usage errors and `--help` come before the libraries that the commands use."""
    code = "import sys; from vfmtok_hf.cli import app; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "typer" in loaded
    assert not set(loaded) & {"torch", "torchvision", "transformers", "diffusers", "datasets", "numpy", "PIL"}
