"""Saved pipelines start in the containers of Inference Endpoints, whose loaders' contracts are repeated here."""

import shutil

import pytest

from vfmtok_hf import DEFAULT_CHECKPOINT
from vfmtok_hf.hub import push

from .conftest import Client


# huggingface-inference-toolkit 0.5.6 prefers handler.py, and takes a pipeline.py without one for its legacy format.
# hf-serve 0.2.0 loads handler.py alone. Both put the module into `sys.modules`, the former its folder into `sys.path`.
LOADERS = """
import importlib.util, sys
from pathlib import Path

def load(file, module_name, class_name, folder):
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return getattr(module, class_name)(folder)

def toolkit(folder):
    sys.path.insert(0, folder)
    if Path(folder, "handler.py").is_file():
        return load(Path(folder, "handler.py"), "handler.EndpointHandler", "EndpointHandler", folder)
    if Path(folder, "pipeline.py").is_file():
        return load(Path(folder, "pipeline.py"), "pipeline.PreTrainedPipeline", "PreTrainedPipeline", folder)

def hf_serve(folder):
    return load(Path(folder, "handler.py"), "custom_handler", "EndpointHandler", folder)
"""
REQUESTS = """
import torch
from diffusers import DiffusionPipeline

for start in (toolkit, hf_serve):
    handler = start({folder!r})
    assert handler.pipe.transformer.dtype == torch.float32
    one = handler({{"inputs": "heart", "parameters": {{"seed": 3}}}})
    several = handler({{"inputs": ["heart", 0], "parameters": {{"seed": 3, "num_images_per_label": 2, "top_k": 5}}}})
    assert one.size == (32, 32) and len(several) == 4
    pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
    expected = pipe(1, generator=torch.Generator().manual_seed(3)).images[0]
    assert one.tobytes() == expected.tobytes()
    alone = handler({{"inputs": 0, "parameters": {{"seed": 6, "top_k": 5}}}})
    assert alone.tobytes() == several[3].tobytes()
    assert handler({{"inputs": "heart", "parameters": None}}).size == (32, 32)
    for body, message in (({{}}, "no inputs"), ({{"inputs": "hart"}}, "Did you mean 'heart'")):
        try:
            handler(body)
        except ValueError as error:
            assert message in str(error)
        else:
            raise AssertionError(body)
"""


@pytest.fixture(scope="module", params=[False, True], ids=["without the package", "with it"])
def container(request, hub, tmp_path_factory):
    with Client(hub, tmp_path_factory.mktemp("container"), packaged=request.param, offline=True) as container:
        yield container


def test_both_loaders_start_a_saved_pipeline(folder, container):
    container(LOADERS + REQUESTS.format(folder=str(folder)))


def test_half_precision_files_are_served_in_float32(published, container, tmp_path):
    pipe = shutil.copytree(published / "pipe", tmp_path / "pipe")
    for weights in pipe.glob("*/model*.safetensors*"):
        if ".fp16" in weights.name:
            weights.rename(weights.with_name(weights.name.replace(".fp16", "")))
        else:
            weights.unlink()
    container(LOADERS + f"import torch\nassert toolkit({str(pipe)!r}).pipe.vq_model.dtype == torch.float32")


@pytest.mark.parametrize("container", [True], indirect=True)
def test_the_toolkit_needs_the_handler(folder, container, tmp_path):
    """It takes pipeline.py, which diffusers needs, for its own legacy format."""
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "handler.py").unlink()
    with pytest.raises(AssertionError, match="PreTrainedPipeline"):
        container(LOADERS + f"toolkit({str(bare)!r})")


def test_pushes_deploy_and_list_nothing_of_it_as_left_out(folder):
    for source in (DEFAULT_CHECKPOINT, folder):
        report = push(source, "me/pipe", dry_run=True)
        assert {"handler.py", "requirements.txt"} <= report.files.keys()
        assert report.left_out == []
