"""The web page of a pipeline: what is in its folder, and what is refused. tests/spaces runs it in a browser."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf.cli import app
from vfmtok_hf.export import export_web_page, web
from vfmtok_hf.export.onnx import onnx_graph
from vfmtok_hf.export.parts import pipeline_parts
from vfmtok_hf.export.pipeline import ExportedPart


onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'vfmtok-hf[export]'")


@pytest.fixture
def without_npm(monkeypatch):
    """Node.js is there, and onnxruntime-web one empty file."""

    def fetch_runtime(folder):
        folder.mkdir()
        (folder / "ort.wasm.min.mjs").touch()

    monkeypatch.setattr(web.shutil, "which", lambda name: name)
    monkeypatch.setattr(web, "fetch_runtime", fetch_runtime)


def test_page_of_a_rar(tmp_path, without_npm):
    pipe = tiny_pipeline("rar")
    pipe.transformer.generation_config.temperature = 0.7
    exported = export_web_page(pipe, tmp_path / "page")
    assert [part.name for part in exported] == ["encoder", "decoder", "decode_step"]
    assert all(part.file.stat().st_size == part.size for part in exported)
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert {path.name for path in web.page_folder().iterdir()} | {"models", "onnxruntime"} == names
    info = json.loads((tmp_path / "page" / "models" / "export.json").read_text())
    assert info["parts"]["decode_step"]["inputs"][-1] == "orders"
    assert (info["sampling"]["temperature"], info["sampling"]["guidance_scale_pow"]) == (0.7, 1.0)
    assert len(info["blank_tokens"]) == info["num_image_tokens"] == 9
    assert re.fullmatch("[0-9a-f]{64}", info["parts"]["decoder"]["sha256"])


def test_a_pipeline_without_generator_has_no_settings_of_sampling():
    pipe = tiny_pipeline()
    pipe.transformer = None
    assert web.page_info(pipe, [1, 2]) == {"name": "", "blank_tokens": [1, 2]}


def test_float16_holds_what_it_holds_exactly(tmp_path, monkeypatch):
    """Half of the file's size at most, and not one bit of the result."""
    exact = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16).astype(np.float32)
    inexact, large = exact + np.float32(1e-4), np.full((64, 64), 1e6, np.float32)
    nodes = [onnx.helper.make_node("MatMul", ["x", "exact"], ["a"])]
    nodes += [onnx.helper.make_node("MatMul", [a, b], [c]) for a, b, c in (("a", "inexact", "b"), ("b", "large", "y"))]
    arrays = {"exact": exact, "inexact": inexact, "large": large}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "products", ports[:1], ports[1:], tensors)
    file = tmp_path / "decoder.onnx"
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    x = web.torch.randn(1, 64)
    (before,), size = onnx_graph(file)(x), file.stat().st_size

    part = pipeline_parts(tiny_pipeline())["decoder"]
    monkeypatch.setattr(type(part), "check", lambda self, graph, batch_size: "checked again")
    stored = web.store_in_half(ExportedPart("decoder", file, size, "checked"), part)
    types = {tensor.name: tensor.data_type for tensor in onnx.load(file).graph.initializer}
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert types == {"exact.float16": half, "inexact": whole, "large": whole}
    assert stored.size == file.stat().st_size < size - exact.nbytes / 2 + 500
    assert stored.check == "checked again"
    assert web.torch.equal(onnx_graph(file)(x)[0], before)


def test_nothing_is_left_where_npm_fails(tmp_path, monkeypatch):
    def fail(command, **settings):
        return web.subprocess.CompletedProcess(command, 1, "", "npm error code E404\n")

    monkeypatch.setattr(web.shutil, "which", lambda name: name)
    monkeypatch.setattr(web.subprocess, "run", fail)
    with pytest.raises(RuntimeError, match=r"npm could not fetch onnxruntime-web@\d+\.\d+\.\d+: npm error code E404"):
        export_web_page(tiny_pipeline(), tmp_path / "page")
    assert list(tmp_path.iterdir()) == []


def test_models_too_large_for_browsers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(web.shutil, "which", lambda name: name)
    monkeypatch.setattr(web, "MAX_PARAMETERS", 1000)
    with pytest.raises(ValueError, match=r"The encoder has \d+ million parameters"):
        export_web_page(tiny_pipeline(), tmp_path / "page")
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_in_one_line(tmp_path, monkeypatch):
    arguments = ["export", "--format", "web", "--output", str(tmp_path / "page")]
    result = CliRunner().invoke(app, [*arguments, "--batch-size", "2"])
    assert result.exit_code == 1
    assert "leave --part and --batch-size out" in result.stderr
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "install Node.js" in result.stderr
    assert list(tmp_path.iterdir()) == []
