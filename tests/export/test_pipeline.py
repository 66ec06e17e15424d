"""Exported graphs compute what the models compute, in files that appear whole or not at all."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.cli import app
from vfmtok_hf.export import export_pipeline
from vfmtok_hf.export import pipeline as export
from vfmtok_hf.export.onnx import onnx_graph
from vfmtok_hf.export.parts import pipeline_parts


ROOT = Path(__file__).parents[2]
EXAMPLE_IMAGES = sorted((ROOT / "examples" / "images").glob("*.png"))


@pytest.fixture(scope="module")
def emoji():
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def emoji_onnx(emoji, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "emoji-onnx"
    export_pipeline(emoji, folder)
    return folder


@pytest.fixture(scope="module")
def tiny_rar_programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "programs"
    torch.manual_seed(0)
    pipe = tiny_pipeline("rar")
    return pipe, folder, export_pipeline(pipe, folder, format="torch")


def greedy(step, pipe, class_labels, *orders):
    """The tokens that a decode step's graph finds most probable, in the order of the sequence."""
    part = pipeline_parts(pipe)["decode_step"]
    _, _, _, keys, values, *_ = part.example(len(class_labels))
    token, tokens = torch.zeros_like(class_labels), []
    for position in range(part.num_positions):
        logits, keys, values = step(class_labels, token, torch.tensor(position), keys, values, *orders)
        if position >= part.condition_positions - 1:
            token = logits.argmax(-1)
            tokens.append(token)
    return torch.stack(tokens, dim=1)


def test_onnx_encoder_gives_the_models_tokens_for_the_example_images(emoji, emoji_onnx):
    pixel_values = emoji.image_processor(EXAMPLE_IMAGES, return_tensors="pt")["pixel_values"]
    (image_tokens,) = onnx_graph(emoji_onnx / "encoder.onnx")(pixel_values)
    assert len(pixel_values) == 14
    assert torch.equal(image_tokens, emoji.tokenize(EXAMPLE_IMAGES))


def test_onnx_decoder_draws_the_same_8_bit_pictures(emoji, emoji_onnx):
    tokens = emoji.tokenize(EXAMPLE_IMAGES)
    (reconstruction,) = onnx_graph(emoji_onnx / "decoder.onnx")(tokens)
    expected = emoji.detokenize(tokens, "uint8").int()
    # Rounding may cross the border between two of the 256 levels.
    assert (emoji.image_processor.to_uint8(reconstruction).int() - expected).abs().max() <= 1


def test_onnx_decode_step_draws_the_models_greedy_tokens(emoji, emoji_onnx):
    labels = torch.tensor([3, 8, 11])
    raster_order = torch.arange(144).expand(3, -1)
    tokens = greedy(onnx_graph(emoji_onnx / "decode_step.onnx"), emoji, labels, raster_order)
    assert torch.equal(tokens, emoji.transformer.generate(labels, do_sample=False))


def test_snippets_of_the_page_run(emoji, emoji_onnx, monkeypatch):
    blocks = re.findall(r"<!-- run -->\n```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(ROOT)
    names = {}
    for block in blocks:
        exec(block.replace("emoji-onnx", emoji_onnx.as_posix()), names)
    assert names["reconstruction"].shape == names["images"].shape == (1, 3, 128, 128)
    assert np.array_equal(names["tokens"], emoji.transformer.generate(torch.tensor([8]), do_sample=False))


def test_torch_programs_of_a_rar_in_any_order(tiny_rar_programs):
    pipe, folder, exported = tiny_rar_programs
    assert [part.name for part in exported] == ["encoder", "decoder", "decode_step"]
    assert all(part.file.is_file() and part.size > 1000 for part in exported)
    step = torch.export.load(folder / "decode_step.pt2").module()
    labels = torch.tensor([0, 3, 4])
    orders = torch.stack([torch.randperm(9) for _ in labels])
    tokens = torch.zeros(3, 9, dtype=torch.int64).scatter(1, orders, greedy(step, pipe, labels, orders))
    assert torch.equal(tokens, pipe.transformer.generate(labels, orders=orders, do_sample=False))


def test_no_program_mentions_autocast(tiny_rar_programs):
    """torch records a region without autocast as a graph of its own, `wrap_with_autocast`, on which export has failed."""
    _, folder, exported = tiny_rar_programs
    for part in exported:
        assert "autocast" not in str(torch.export.load(part.file).graph)


def test_torch_programs_take_any_batch(tiny_rar_programs):
    pipe, folder, _ = tiny_rar_programs
    encoder = torch.export.load(folder / "encoder.pt2").module()
    decoder = torch.export.load(folder / "decoder.pt2").module()
    for batch_size in (1, 2, 5):
        pixel_values = torch.rand(batch_size, 3, 32, 32) * 2 - 1
        tokens = encoder(pixel_values)
        assert torch.equal(tokens, pipe.vq_model.encode(pixel_values).image_tokens)
        torch.testing.assert_close(decoder(tokens), pipe.vq_model.decode(tokens).reconstruction)


def test_onnx_decode_step_of_a_rar(tmp_path):
    pipe = tiny_pipeline("rar")
    (step,) = export_pipeline(pipe, tmp_path / "step", parts=["decode_step"])
    labels, orders = torch.tensor([1, 2]), torch.stack([torch.randperm(9), torch.arange(9)])
    tokens = torch.zeros(2, 9, dtype=torch.int64).scatter(
        1, orders, greedy(onnx_graph(step.file), pipe, labels, orders)
    )
    assert torch.equal(tokens, pipe.transformer.generate(labels, orders=orders, do_sample=False))


def test_a_program_holds_the_weights_of_its_part_alone(tiny_rar_programs):
    _, folder, _ = tiny_rar_programs
    names = torch.export.load(folder / "decoder.pt2").state_dict
    assert any("pixel_decoder" in name for name in names)
    assert not any("vision_model" in name or "anchor_encoder" in name for name in names)


def test_one_batch_size(tmp_path):
    pipe = tiny_pipeline()
    (decoder,) = export_pipeline(pipe, tmp_path / "fixed", "torch", ["decoder"], batch_size=3)
    program = torch.export.load(decoder.file).module()
    assert program(torch.zeros(3, 9, dtype=torch.int64)).shape == (3, 3, 32, 32)
    with pytest.raises(AssertionError):
        program(torch.zeros(2, 9, dtype=torch.int64))
    info = json.loads((tmp_path / "fixed" / "export.json").read_text())
    assert info["batch_size"] == 3
    assert list(info["parts"]) == ["decoder"]
    assert "generator" not in info


@pytest.mark.parametrize("part", ["encoder", "decoder", "decode_step"])
def test_a_graph_that_differs_from_its_model_is_not_written(tmp_path, monkeypatch, part):
    def wrong(part, program, file):
        file.touch()
        return lambda *inputs: [outputs.flip(-1) for outputs in as_tuple(part(*inputs))]

    monkeypatch.setitem(export.WRITERS, "torch", wrong)
    monkeypatch.setattr(export, "export_program", lambda part, batch_size: None)
    with pytest.raises(ValueError, match="Nothing was written"):
        export_pipeline(tiny_pipeline(), tmp_path / "wrong", "torch", [part])
    assert list(tmp_path.iterdir()) == []


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_bad_requests(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="format must be 'onnx' or 'torch', got 'tflite'"):
        export_pipeline(pipe, tmp_path / "out", "tflite")
    with pytest.raises(ValueError, match="no part 'vae'"):
        export_pipeline(pipe, tmp_path / "out", parts=["vae"])
    pipe.transformer = None
    with pytest.raises(ValueError, match="has no generator"):
        export_pipeline(pipe, tmp_path / "out", parts=["decode_step"])
    pipe.vq_model.vision_model = None
    with pytest.raises(ValueError, match="no vision weights"):
        export_pipeline(pipe, tmp_path / "out", parts=["encoder"])
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        export_pipeline(pipe, tmp_path / "out")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "vfmtok-hf\[export\]"'):
        export_pipeline(pipe, tmp_path / "elsewhere")


def test_command(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    arguments = ["export", "-m", str(tmp_path / "tiny"), "-f", "torch", "-p", "decoder", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"decoder\.pt2  \d+\.\d MB  pixels differ by at most .* \(batch of 4\)", result.stdout)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["decoder.pt2", "export.json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "choose another output, or delete it" in result.stderr
