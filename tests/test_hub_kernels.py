"""Compiled deformable attention: found, bound, equal to the pure-PyTorch layer, and never in the way."""

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrModel, ResNetConfig

from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.testing import (
    REFERENCE,
    REFERENCE_TOKENIZER_CONFIG,
    reference_images,
    reference_tensors,
    tiny_images,
    tiny_model,
    tiny_vfmae,
)
from vfmtok_hf import VFMAEModel, VFMTokModel, hub_kernels
from vfmtok_hf.conversion import convert_tokenizer, convert_vfmae
from vfmtok_hf.cpu.packing import pack_weights
from vfmtok_hf.hub_kernels import active_implementation, disable_kernels, enable_kernels, kernel_facts
from vfmtok_hf.modeling.modeling_vfmtok import MultiScaleDeformableAttention


ROOT = Path(__file__).parent.parent
NO_KERNELS = "the kernels library is not installed: pip install 'vfmtok-hf[kernel]'"
CASES = json.loads((REFERENCE / "deform_attn" / "cases.json").read_text())


@pytest.fixture(scope="session")
def kernel_build():
    """A folder with the CPU kernel built for the installed torch; built once and kept while its sources are the same."""
    pytest.importorskip("kernels", reason=NO_KERNELS)
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler to build the kernel: install g++ or set CXX")
    command = [sys.executable, ROOT / "kernel" / "dev_build.py", "--output", ROOT / "build" / "kernel"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ROOT / "build" / "kernel"


@pytest.fixture(autouse=True)
def no_other_source(monkeypatch, tmp_path):
    """Neither the developer's own build nor environment nor a message logged by another test takes part."""
    monkeypatch.setattr(hub_kernels, "CHECKOUT_KERNEL", tmp_path / "no-checkout")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    hub_kernels._log_once.cache_clear()


@pytest.fixture
def python_kernel(tmp_path):
    """A kernel folder whose layer needs no compiler: it returns the value it was bound for, so that a call shows it."""

    def write(body="return value.new_full((), 42.0)", identifier="_marker", backend="cpu", variant="torch-cpu"):
        folder = tmp_path / identifier / "build" / variant
        folder.mkdir(parents=True)
        signature = (
            "self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, "
            "sampling_locations, attention_weights, im2col_step"
        )
        (folder / "__init__.py").write_text("from . import layers\n")
        (folder / "layers.py").write_text(
            "from torch import nn\n\n\nclass MultiScaleDeformableAttention(nn.Module):\n"
            f"    def forward({signature}):\n        {body}\n"
        )
        metadata = {"name": "marker", "id": identifier, "version": 1, "license": "Apache-2.0", "python-depends": []}
        (folder / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": backend}}))
        return tmp_path / identifier

    pytest.importorskip("kernels", reason=NO_KERNELS)
    return write


def arguments(batch=2, queries=5, heads=2, channels=8, shapes=((3, 4), (2, 2)), points=3, dtype=torch.float32):
    """The seven arguments of the layer; about a quarter of the samples lie outside."""
    levels = len(shapes)
    starts = torch.tensor([0, *(height * width for height, width in shapes)]).cumsum(0)
    weights = torch.rand(batch, queries, heads, levels * points).softmax(-1)
    return [
        torch.randn(batch, int(starts[-1]), heads, channels, dtype=dtype),
        torch.tensor(shapes),
        list(shapes),
        starts[:-1],
        (torch.rand(batch, queries, heads, levels, points, 2) * 1.3 - 0.15).to(dtype),
        weights.view(batch, queries, heads, levels, points).to(dtype),
        64,
    ]


def output_and_gradients(module, arguments, grad_output):
    leaves = {index: arguments[index].detach().clone().requires_grad_() for index in (0, 4, 5)}
    output = module(*(leaves.get(index, argument) for index, argument in enumerate(arguments)))
    return output, *torch.autograd.grad(output, list(leaves.values()), grad_output)


# ---------------------------------------------------------------------------------------------------------------
# The compiled layer computes what the pure-PyTorch layer computes


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_reference_case(kernel_build, case, dtype):
    prefix = f"{case}."
    tensors = load_file(REFERENCE / "deform_attn" / "cases.safetensors")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    shapes = tensors["spatial_shapes"]
    layer_arguments = [
        tensors["value"].to(dtype),
        shapes,
        [tuple(shape) for shape in shapes.tolist()],
        tensors["level_start_index"],
        tensors["sampling_locations"].to(dtype),
        tensors["attention_weights"].to(dtype),
        64,
    ]
    grad_output = tensors["grad_output"].to(dtype)
    compiled = enable_kernels(MultiScaleDeformableAttention(), mode="training", path=kernel_build)
    assert active_implementation(compiled).startswith("compiled")

    results = output_and_gradients(compiled, layer_arguments, grad_output)
    fallback_results = output_and_gradients(MultiScaleDeformableAttention(), layer_arguments, grad_output)
    precision, tolerance = ("f32", 1e-5) if dtype == torch.float32 else ("f64", 1e-12)
    names = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
    for name, result, fallback in zip(names, results, fallback_results, strict=True):
        expected = tensors[f"{precision}.{name}"]
        if name == "grad_sampling_locations" and "location_gradient_comparable" in tensors:
            comparable = tensors["location_gradient_comparable"]
            result, fallback, expected = result[comparable], fallback[comparable], expected[comparable]
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, msg=f"{name} of the original")
        torch.testing.assert_close(result, fallback, rtol=tolerance, atol=tolerance, msg=f"{name} of the fallback")


@pytest.mark.kernel
def test_converted_tokenizer_gives_the_same_image_tokens(kernel_build, tmp_path):
    convert_tokenizer(
        REFERENCE / "tokenizer" / "tokenizer.pt",
        tmp_path / "converted",
        vision_checkpoint=REFERENCE / "tokenizer" / "backbone.pt",
        config={"encoder_num_heads": 8, "decoder_num_heads": 4, "vision_config": {"num_attention_heads": 2}},
    )
    model = VFMTokModel.from_pretrained(tmp_path / "converted").eval()
    images = reference_images("b336_0", "b336_1")
    with torch.no_grad():
        expected = model.encode(images)
        enable_kernels(model, path=kernel_build)
        encoded = model.encode(images)
    assert active_implementation(model).startswith("compiled")
    assert torch.equal(encoded.image_tokens, expected.image_tokens)
    torch.testing.assert_close(encoded.latents, expected.latents, rtol=0, atol=1e-5)


@pytest.mark.kernel
def test_converted_vfmae_gives_the_same_latents(kernel_build, tmp_path):
    convert_vfmae(
        REFERENCE / "vfmae" / "vfmae.pt",
        tmp_path / "converted",
        vision_checkpoint=REFERENCE / "vfmae" / "backbone.pt",
        config=REFERENCE_TOKENIZER_CONFIG,
    )
    model = pack_weights(VFMAEModel.from_pretrained(tmp_path / "converted").eval())
    enable_kernels(model, path=kernel_build)
    assert active_implementation(model).startswith("compiled")
    with torch.no_grad():
        latents = model.encode(reference_images("b256_0", "b256_1", model="vfmae")).latents
    torch.testing.assert_close(latents, reference_tensors("vfmae")["b256.encode_imgs"], rtol=0, atol=5e-5)


@pytest.mark.kernel
def test_training_step_has_the_same_gradients(kernel_build):
    torch.manual_seed(0)
    model = tiny_model()
    images = tiny_images()
    gradients = []
    for switch in (disable_kernels, lambda module: enable_kernels(module, mode="training", path=kernel_build)):
        switch(model)
        model.zero_grad()
        model(images, return_loss=True).loss.backward()
        gradients.append([p.grad.clone() for p in model.anchor_encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.kernel
def test_compiles_into_one_graph(kernel_build):
    module = enable_kernels(MultiScaleDeformableAttention(), mode="training", path=kernel_build)
    layer_arguments = arguments()
    grad_output = torch.randn(2, 5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        output_and_gradients(compiled, layer_arguments, grad_output),
        output_and_gradients(module, layer_arguments, grad_output),
    )


@pytest.mark.kernel
def test_autocast_gives_what_the_fallback_gives(kernel_build):
    layer_arguments = arguments()
    layer_arguments[0] = layer_arguments[0].bfloat16()
    module = MultiScaleDeformableAttention()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(*layer_arguments)
        output = enable_kernels(module, path=kernel_build)(*layer_arguments)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.kernel
def test_deformable_detr_is_served_too(kernel_build):
    """A whole model, forward and backward: it hands over strided tensors and the level sizes on the device."""
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1] * 4, out_indices=[2, 3, 4])
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    config = DeformableDetrConfig(
        backbone_config=backbone, num_queries=7, num_feature_levels=3, **sizes, **layers, **heads
    )
    model = DeformableDetrModel(config).eval()
    images = torch.randn(2, 3, 64, 96, requires_grad=True)

    def states_and_gradient():
        states = model(images).last_hidden_state
        return states, *torch.autograd.grad(states.square().sum(), images)

    expected = states_and_gradient()
    enable_kernels(model, mode="training", path=kernel_build)
    assert active_implementation(model).startswith("compiled")
    torch.testing.assert_close(states_and_gradient(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.kernel
@pytest.mark.parametrize("instructions", ["", "default", "avx2"])
def test_kernel_repository_passes_its_own_tests(kernel_build, instructions):
    """As a stand-alone project and with every instruction set; the narrower ones on the numerical tests."""
    environment = {**os.environ, "LOCAL_KERNELS": f"vfmtok-hf/vfmtok-msda={kernel_build}"}
    selection = []
    if instructions:
        environment["ATEN_CPU_CAPABILITY"] = instructions
        selection = ["-k", "reference or nowhere"]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider"]
    completed = subprocess.run(
        [*command, "tests", *selection], cwd=ROOT / "kernel", env=environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stdout
    assert "skipped" not in completed.stdout, completed.stdout


# ---------------------------------------------------------------------------------------------------------------
# Where a layer comes from


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_a_local_build_exports_only_its_init_function(kernel_build):
    """Otherwise a statically linked C++ library is mixed with torch's."""
    libraries = list(kernel_build.rglob("_vfmtok_msda_*.so"))
    assert libraries
    for library in libraries:
        printed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
        assert [line.split()[-1] for line in printed.stdout.splitlines()] == [f"PyInit_{library.name.split('.')[0]}"]


def test_order_of_sources(python_kernel, monkeypatch, tmp_path):
    explicit, local, checkout = (python_kernel(identifier=name) for name in ("_explicit", "_local", "_checkout"))
    (checkout / "build.toml").touch()
    module = MultiScaleDeformableAttention()

    assert active_implementation(enable_kernels(module)) == "pure PyTorch"
    monkeypatch.setattr(hub_kernels, "CHECKOUT_KERNEL", checkout)
    assert "this checkout" in active_implementation(enable_kernels(module))
    monkeypatch.setenv("LOCAL_KERNELS", f"other/kernel=/nowhere:{hub_kernels.KERNEL_REPO_ID}={local}")
    assert "LOCAL_KERNELS" in active_implementation(enable_kernels(module))
    assert str(explicit) in active_implementation(enable_kernels(module, path=explicit))
    assert module(*arguments()) == 42
    # A variant folder is as good as the folder above it.
    assert str(explicit) in active_implementation(enable_kernels(module, path=explicit / "build" / "torch-cpu"))


def test_locked_revision_is_used_from_the_cache(python_kernel, monkeypatch, tmp_path):
    commit = "0123456789" * 4
    repository = hub_kernels.KERNEL_REPO_ID
    snapshot = tmp_path / "cache" / f"kernels--{repository.replace('/', '--')}" / "snapshots" / commit
    shutil.copytree(python_kernel(identifier="_locked"), snapshot)
    lock = [{"dependency": {"repo-id": repository, "version": 1}, "lock": {"commit": commit}}]
    (tmp_path / "kernels.lock").write_text(json.dumps(lock))
    monkeypatch.setattr(hub_kernels, "LOCK_FILE", tmp_path / "kernels.lock")
    monkeypatch.setattr("kernels.resolver.CACHE_DIR", str(tmp_path / "cache"))
    module = enable_kernels(MultiScaleDeformableAttention())
    assert active_implementation(module) == f"compiled: {repository}"
    assert module(*arguments()) == 42


def test_locked_revision_that_is_not_in_the_cache_is_not_fetched(monkeypatch, tmp_path):
    pytest.importorskip("kernels", reason=NO_KERNELS)
    lock = [{"dependency": {"repo-id": hub_kernels.KERNEL_REPO_ID, "version": 1}, "lock": {"commit": "0" * 40}}]
    (tmp_path / "kernels.lock").write_text(json.dumps(lock))
    monkeypatch.setattr(hub_kernels, "LOCK_FILE", tmp_path / "kernels.lock")
    monkeypatch.setattr("kernels.resolver.CACHE_DIR", str(tmp_path / "cache"))
    assert active_implementation(enable_kernels(MultiScaleDeformableAttention())) == "pure PyTorch"
    assert "Cannot find a local snapshot" in kernel_facts()[f"  not {hub_kernels.KERNEL_REPO_ID}"]


def test_without_the_kernels_library(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "kernels", None)
    (tmp_path / "kernel").mkdir()
    module = enable_kernels(MultiScaleDeformableAttention(), path=tmp_path / "kernel")
    assert active_implementation(module) == "pure PyTorch"
    assert "pip install 'vfmtok-hf[kernel]'" in caplog.text
    assert module(*arguments()).shape == (2, 5, 16)


@pytest.mark.parametrize("damage", ["missing folder", "empty folder", "other torch", "no layer", "broken import"])
def test_damaged_builds_are_named_once_and_passed_over(python_kernel, tmp_path, caplog, damage):
    folder = python_kernel(identifier=f"_{damage.replace(' ', '_')}")
    variant = folder / "build" / "torch-cpu"
    if damage == "missing folder":
        folder = tmp_path / "nowhere"
    elif damage == "empty folder":
        shutil.rmtree(variant)
    elif damage == "other torch":
        folder = variant.rename(variant.with_name("torch19-cxx11-cpu-x86_64-linux"))
    elif damage == "no layer":
        (variant / "layers.py").write_text("")
    else:
        (variant / "__init__.py").write_text("raise ImportError('undefined symbol')")
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        module = enable_kernels(MultiScaleDeformableAttention(), path=folder)
        assert active_implementation(module) == "pure PyTorch"
    assert module(*arguments()).shape == (2, 5, 16)
    assert caplog.text.count(str(folder)) >= 1
    assert len(caplog.records) == 1


@pytest.mark.kernel
def test_a_copy_of_a_loaded_build_is_the_loaded_build(kernel_build, tmp_path):
    """Registering the same operators twice would end the process."""
    shutil.copytree(kernel_build, tmp_path / "copy")
    first = enable_kernels(MultiScaleDeformableAttention(), path=kernel_build)
    second = enable_kernels(MultiScaleDeformableAttention(), path=tmp_path / "copy")
    layer_arguments = arguments()
    assert torch.equal(first(*layer_arguments), second(*layer_arguments))


def test_community_layer_is_given_what_it_accepts():
    """Its limits, read from its source: one dtype, contiguous tensors, a batch that im2col_step divides."""

    class Community(nn.Module):
        def forward(
            self,
            value,
            value_spatial_shapes,
            value_spatial_shapes_list,
            level_start_index,
            sampling_locations,
            attention_weights,
            im2col_step,
        ):
            tensors = (value, sampling_locations, attention_weights)
            assert len({tensor.dtype for tensor in tensors}) == 1
            assert all(tensor.is_contiguous() for tensor in tensors)
            assert value.shape[0] % min(value.shape[0], im2col_step) == 0
            return value.new_full((), im2col_step)

    layer = hub_kernels._community_layer(Community)()
    layer_arguments = arguments(batch=6)
    layer_arguments[0] = layer_arguments[0].bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    layer_arguments[6] = 4
    assert layer(*layer_arguments) == 2


# ---------------------------------------------------------------------------------------------------------------
# Used by pipelines unasked


@pytest.mark.kernel
def test_pipelines_use_a_build_that_is_found(kernel_build, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"{hub_kernels.KERNEL_REPO_ID}={kernel_build}")
    pipe, images = tiny_pipeline("ar"), list((tiny_images() + 1) / 2)
    assert active_implementation(pipe.vq_model) == "pure PyTorch"  # construction looks for nothing
    compiled = pipe.tokenize(images)
    assert "LOCAL_KERNELS" in active_implementation(pipe.vq_model)
    disable_kernels(pipe.vq_model)
    assert torch.equal(pipe.tokenize(images), compiled)
    assert active_implementation(pipe.vq_model) == "pure PyTorch"  # what the user chose stays


def test_pipelines_look_once_for_each_device(monkeypatch):
    tried = []
    monkeypatch.setattr(hub_kernels, "_sources", lambda device_type, *_: tried.append(device_type) or iter(()))
    model = tiny_model()
    for device in ("cpu", "cpu", "cuda", "cuda", "cpu"):
        hub_kernels.use_found_kernels(model, device)
    assert tried == ["cpu", "cuda", "cpu"]
    enable_kernels(model)
    hub_kernels.use_found_kernels(model, "cuda")
    assert tried == ["cpu", "cuda", "cpu", "cpu"]


def test_pipelines_work_with_a_broken_build_and_say_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("LOCAL_KERNELS", f"{hub_kernels.KERNEL_REPO_ID}={tmp_path / 'nowhere'}")
    for pipe in (tiny_pipeline("ar"), tiny_pipeline("ar")):
        assert len(pipe.tokenize(list((tiny_images() + 1) / 2))) == 2
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_pipelines_work_without_the_package(monkeypatch):
    """As when the pipeline's file is loaded from a Hub repository."""
    monkeypatch.setitem(sys.modules, "vfmtok_hf.hub_kernels", None)
    assert len(tiny_pipeline("ar").tokenize(list((tiny_images() + 1) / 2))) == 2


# ---------------------------------------------------------------------------------------------------------------
# Binding


@pytest.mark.parametrize("build", [tiny_model, tiny_vfmae])
def test_whole_models_are_bound_and_unbound(build, python_kernel):
    model = build()
    assert active_implementation(model) == "pure PyTorch"
    assert enable_kernels(model, path=python_kernel()) is model
    assert active_implementation(model).startswith("compiled")
    assert model.state_dict().keys() == build().state_dict().keys()
    assert disable_kernels(model) is model
    assert active_implementation(model) == "pure PyTorch"
    model.encode(tiny_images())


def test_models_without_the_layer_are_left_alone():
    model = nn.Linear(2, 2)
    assert active_implementation(enable_kernels(model)) == "none"


def test_binding_survives_train_deepcopy_and_pickle(python_kernel):
    module = enable_kernels(MultiScaleDeformableAttention(), mode="training", path=python_kernel())
    module.train().eval()
    assert module(*arguments()) == 42
    copied = copy.deepcopy(module)
    assert copied(*arguments()) == 42
    disable_kernels(copied)
    assert copied(*arguments()).shape == (2, 5, 16)
    assert module(*arguments()) == 42
    # A pickle may be read where the kernel is not: it holds the pure-PyTorch layer, to be enabled again.
    unpickled = pickle.loads(pickle.dumps(module))  # noqa: S301
    assert active_implementation(unpickled) == "pure PyTorch"
    assert unpickled(*arguments()).shape == (2, 5, 16)


def test_tensors_on_another_device_take_the_fallback(python_kernel):
    module = enable_kernels(MultiScaleDeformableAttention(), path=python_kernel(), device="cpu")
    on_meta = [item.to("meta") if isinstance(item, torch.Tensor) else item for item in arguments()]
    assert module(*on_meta).shape == (2, 5, 16)


def test_layers_that_cannot_be_traced_take_the_fallback_under_compile(python_kernel):
    module = enable_kernels(MultiScaleDeformableAttention(), path=python_kernel())
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert compiled(*arguments()).shape == (2, 5, 16)
    assert module(*arguments()) == 42


def test_training_refuses_layers_without_backward(python_kernel):
    folder = python_kernel(identifier="_forward_only")
    layers = folder / "build" / "torch-cpu" / "layers.py"
    layers.write_text(layers.read_text().replace("    def forward", "    has_backward = False\n\n    def forward"))
    assert active_implementation(enable_kernels(MultiScaleDeformableAttention(), path=folder)).startswith("compiled")
    module = enable_kernels(MultiScaleDeformableAttention(), mode="training", path=folder)
    assert active_implementation(module) == "pure PyTorch"


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="mode must be"):
        enable_kernels(MultiScaleDeformableAttention(), mode="eval")


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_facts_explain_the_choice(device):
    facts = kernel_facts(device)
    assert facts.pop("deformable attention") == "pure PyTorch"
    assert all(facts.values())


def test_the_package_imports_no_kernels():
    code = "import sys, vfmtok_hf, vfmtok_hf.hub_kernels; assert 'kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
