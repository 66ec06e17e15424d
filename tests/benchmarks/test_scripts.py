"""The benchmark scripts run, at sizes that take no time. What they measure is not looked at."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.testing import tiny_config
from vfmtok_hf import (
    DEFAULT_CHECKPOINT,
    VFMTokARConfig,
    VFMTokARForImageGeneration,
    VFMTokRARConfig,
    VFMTokRARForImageGeneration,
)


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import result_tables

    monkeypatch.setattr(result_tables, "RESULTS", tmp_path / "results")


def table_of(tmp_path, name):
    return (tmp_path / "results" / f"{name}.md").read_text().splitlines()


MEMORY_OF_A_BLOCK = """
from measuring import memory
before = memory("RssAnon")
block = bytearray(64 * 2**20)
assert memory("RssAnon") - before > 0.9 * len(block)
assert memory("VmHWM") >= memory("RssAnon")
"""


def test_memory_of_a_process_counts_what_it_holds():
    """Of a new one: this may hold free memory that a block needs no more pages for."""
    subprocess.run([sys.executable, "-c", MEMORY_OF_A_BLOCK], check=True, cwd=BENCHMARKS)


def test_a_side_runs_in_its_own_process(tmp_path):
    from measuring import SideProcess

    side = SideProcess(partial, shutil.copyfile, "/proc/self/stat")
    assert all(side(tmp_path / name) > 0 for name in ("first", "second"))
    assert side.close() > 2**20
    assert not side.process.is_alive()
    processes = {int((tmp_path / name).read_text().split()[0]) for name in ("first", "second")}
    assert processes == {side.process.pid} != {os.getpid()}


def test_preprocessing_and_peaks_of_images(tmp_path, capsys):
    import images

    images.measure_preprocessing(2, 1, tiny_config())
    assert len(table_of(tmp_path, "preprocessing")) == 2 + 4
    images.print_peak("decode", "packed float32", 2, tiny_config())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] >= 0


@pytest.mark.parametrize(
    ("name", "model_class"), [("AR-B", VFMTokARForImageGeneration), ("RAR-L", VFMTokRARForImageGeneration)]
)
def test_tiny_generators_have_the_sizes_of_the_checkpoint(name, model_class):
    from random_models import SIZES, generator_config, random_generator

    model = random_generator(generator_config(name, tiny=True))
    shipped = VFMTokRARConfig.from_pretrained(Path(DEFAULT_CHECKPOINT, "transformer"))
    assert type(model) is model_class
    assert {field: getattr(model.config, field) for field in SIZES} == {
        field: getattr(shipped, field) for field in SIZES
    }


def test_quantized_sides_of_the_checkpoint():
    pytest.importorskip("torchao", reason="needs vfmtok-hf[quantization]")
    import quantization

    folder = Path(DEFAULT_CHECKPOINT) / "transformer"
    plain, packed = (quantization.load_side(folder, side) for side in ("float32", "int8, packed"))
    assert type(packed) is VFMTokRARForImageGeneration
    assert quantization.bytes_in_memory(packed) < quantization.bytes_in_memory(plain) / 2
    labels = torch.arange(2)
    assert packed.generate(labels, do_sample=False).shape == plain.generate(labels, do_sample=False).shape


def test_graphs_of_vfmae(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import images
    from random_models import random_tokenizer, vfmae_config

    parts = images.graph_parts(random_tokenizer(vfmae_config(tiny=True)), 1)
    with torch.no_grad():
        outputs = {part: run() for part, run in parts.items()}
    assert outputs["encode"].latents.shape == (1, 32, 16, 16)
    assert outputs["decode"].reconstruction.shape == (1, 3, 256, 256)
    assert images.count_operations(vfmae_config(tiny=True), 1, "cpu")["decode"] > 1e6


def test_images_without_products_of_bfloat16(tmp_path, monkeypatch):
    """As on a CPU that stops at AVX2, where oneDNN refuses them."""
    import images

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for found, sides in (("pure PyTorch", []), ("compiled: here", ["packed float32, kernel"])):
        monkeypatch.setattr(images, "active_implementation", lambda layer, found=found: found)
        assert images.graph_sides("cpu") == ["straightforward float32", "packed float32", *sides]
    assert images.memory_sides() == ["straightforward float32", "packed float32"]
    images.measure_preprocessing(1, 1, tiny_config())
    assert "encode, packed float32" in table_of(tmp_path, "preprocessing")[2]


def test_scaling(tmp_path, monkeypatch):
    import scaling

    from vfmtok_hf.plotting import save_figure

    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    sizes = {**tiny, "codebook_size": 32, "num_classes": 64}
    monkeypatch.setattr(
        VFMTokARConfig, "from_variant", lambda variant, **overrides: VFMTokARConfig(**{**sizes, **overrides})
    )
    monkeypatch.setattr(scaling, "BATCH_SIZES", (1, 2))
    monkeypatch.setattr(scaling, "TOKENS_PER_IMAGE", (36,))
    monkeypatch.setattr(scaling, "MODEL_SIZES", ("B",))
    table = scaling.measure_decoding(runs=1)
    assert {row["axis"] for row in table} == {"images at once", "threads", "tokens per image", "million parameters"}
    save_figure(scaling.decoding_figure(table), tmp_path / "decoding.png")
    rows = [{"side": 10, "seconds": "1.0", "images/s": "10", "peak MB": "9"}]
    save_figure(scaling.tokenizing_figure(rows), tmp_path / "tokenizing.png")


def test_scaling_tokenizes(tmp_path, monkeypatch, capsys):
    import scaling

    # Which keeps the command from setting this process's threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "images").mkdir()
    scaling.write_images(tmp_path / "images", 2)
    scaling.print_tokenizing(str(tmp_path / "images"), str(tmp_path / "tokens.npy"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] > 0
    assert (tmp_path / "tokens.npy").exists()


def test_loading_of_a_pipeline(capsys):
    import startup

    for side in startup.LOADING:
        startup.print_loading(DEFAULT_CHECKPOINT, side)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] > 0


@pytest.mark.parametrize(("storage", "bytes_per_weight", "tolerance"), [("in_float16", 2, 1e-3), ("in_int8", 1, 2e-2)])
def test_stored_weights_are_restored(tmp_path, storage, bytes_per_weight, tolerance):
    onnx = pytest.importorskip("onnx", reason="needs vfmtok-hf[export]")
    import export_weights

    from vfmtok_hf.export.onnx import onnx_graph

    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 64), torch.eye(64)
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[64, 64])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["inputs", "weight"], ["outputs"])],
        "product",
        [value("inputs")],
        [value("outputs")],
        [onnx.numpy_helper.from_array(weight.numpy(), "weight")],
    )
    file = tmp_path / "graph.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), file)
    export_weights.store(file, getattr(export_weights, storage))
    size = file.stat().st_size
    assert bytes_per_weight * weight.numel() < size < bytes_per_weight * weight.numel() + 1500
    torch.testing.assert_close(onnx_graph(file)(inputs)[0], weight, rtol=0, atol=tolerance)
