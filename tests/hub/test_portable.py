"""Saved models and pipelines load from folders and from the Hub, online and offline, with this package and without it."""

import json
import re

import pytest
import torch
from accelerate.hooks import CpuOffload
from safetensors.torch import save_file

from tests.pipelines.tiny_pipeline import tiny_dit_pipeline, tiny_pipeline
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokImageProcessor, VFMTokModel, VFMTokPipeline
from vfmtok_hf.pipelines.portable_vfmtok import portable_code

from .conftest import Client


def needs_gpu(test):
    """`pytest -m gpu` on a machine with a CUDA device runs these."""
    missing = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a CUDA device")(test))


# With `expected`, the folder of the published models, and `options` for every `from_pretrained`.
CHECK_MODELS = """
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

expected, options = load_file({published!r} + "/expected"), {options!r}

def check_tokenizer(path, **more):
    tokenizer = AutoModel.from_pretrained(path, **options, **more)
    assert type(tokenizer).__module__.startswith({module!r}), type(tokenizer)
    assert tokenizer.encode(expected["images"]).image_tokens.equal(expected["tokens"])
    reconstruction = tokenizer.decode(image_tokens=expected["tokens"]).reconstruction
    torch.testing.assert_close(reconstruction, expected["reconstruction"])
    assert not any(parameter.requires_grad for parameter in tokenizer.vision_model.parameters())
    return tokenizer

def check_generator(path, name):
    logits = AutoModel.from_pretrained(path, **options)(expected["labels"], expected["tokens"]).logits
    torch.testing.assert_close(logits, expected[name])

tokenizer = check_tokenizer("tester/tokenizer")
processor = AutoImageProcessor.from_pretrained("tester/tokenizer", **options)
picture = Image.fromarray(expected["picture"].numpy())
pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
torch.testing.assert_close(pixel_values, expected["pixel_values"])
assert tokenizer.encode(pixel_values).image_tokens.equal(expected["picture tokens"])
for name in ("ar", "rar"):
    check_generator("tester/" + name, name)
"""
CHECK_FOLDERS = """
check_tokenizer("tester/pipe", subfolder="vq_model")
check_tokenizer({published!r} + "/pipe/vq_model")
check_generator({published!r} + "/pipe/transformer", "rar")
for part in (tokenizer, processor):
    part.save_pretrained("again")
check_tokenizer("again")
assert AutoImageProcessor.from_pretrained("again", **options).size == processor.size
"""
CHECK_PIPELINE = """
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

expected = load_file({published!r} + "/expected")

def check_pipeline(path, cls=DiffusionPipeline, dtype=torch.float32, **options):
    if cls is DiffusionPipeline:
        options = dict(options, trust_remote_code=True)
    pipe = cls.from_pretrained(path, **options)
    assert type(pipe).__module__.startswith({module!r}), type(pipe)
    assert pipe.transformer.dtype == pipe.vq_model.dtype == dtype
    assert pipe.tokenize(expected["images"] / 2 + 0.5).equal(expected["tokens"])
    drawn = pipe([0, 3], generator=torch.Generator().manual_seed(0), output_type="tokens").images
    assert drawn.equal(expected["drawn"])
    torch.testing.assert_close(pipe.detokenize(drawn, "pt"), expected["pictures drawn"])
    picture = Image.fromarray(expected["picture"].numpy())
    assert pipe.tokenize(picture).equal(expected["picture tokens"])
    return pipe
"""
LIST_SNAPSHOT = """
from huggingface_hub import snapshot_download
print(snapshot_download("tester/pipe"))
"""


def fill(code: str, published, module: str, **options) -> str:
    return code.format(published=str(published), options=options, module=module)


def test_without_the_package(published, hub, tmp_path):
    with Client(hub, tmp_path, packaged=False) as online:
        online(fill(CHECK_MODELS + CHECK_FOLDERS, published, "transformers_modules.", trust_remote_code=True))
        online(
            fill(CHECK_PIPELINE, published, "diffusers_modules.")
            + f"""
for path in ("tester/pipe", {str(published / "pipe")!r}):
    pipe = check_pipeline(path)
    pipe.save_pretrained("pipe_again")
    check_pipeline("pipe_again")
check_pipeline("tester/pipe", variant="fp16")
check_pipeline("tester/pipe", type(pipe))
pipe = DiffusionPipeline.from_pretrained("tester/pipe", trust_remote_code=True, transformer=None)
assert pipe.transformer is None
"""
        )
        snapshot = online(LIST_SNAPSHOT).strip()
    with Client(hub, tmp_path, packaged=False, offline=True) as offline:
        offline(fill(CHECK_MODELS, published, "transformers_modules.", trust_remote_code=True))
        offline(fill(CHECK_PIPELINE, published, "diffusers_modules.") + f"\ncheck_pipeline({snapshot!r})")


def test_with_the_package_no_remote_code_is_needed(published, hub, client, home):
    client("import vfmtok_hf" + fill(CHECK_MODELS + CHECK_FOLDERS, published, "vfmtok_hf."))
    code = fill(CHECK_PIPELINE, published, "vfmtok_hf.pipelines") + "\nfrom vfmtok_hf import VFMTokPipeline\n"
    client(
        code
        + f"""
for path in ("tester/pipe", {str(published / "pipe")!r}):
    check_pipeline(path, VFMTokPipeline)
    check_pipeline(path)  # an installed package comes before the repository's code
"""
    )
    with Client(hub, home, offline=True) as offline:
        offline("import vfmtok_hf" + fill(CHECK_MODELS, published, "vfmtok_hf."))
        offline(code + 'check_pipeline("tester/pipe", VFMTokPipeline)')


def test_download_takes_one_variant_and_no_passed_component(published, client):
    client(
        """
        from pathlib import Path
        from vfmtok_hf import VFMTokPipeline

        def fetched(cache, **options):
            folder = Path(VFMTokPipeline.download("tester/pipe", cache_dir=cache, **options))
            return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}

        whole, half = fetched("a"), fetched("b", variant="fp16", transformer=None)
        assert "transformer/generation_config.json" in whole
        assert "vq_model/model-00001-of-00009.safetensors" in whole
        assert not any("fp16" in name for name in whole)
        assert "vq_model/model.fp16.safetensors" in half
        assert not any(name.startswith(("transformer/", "vq_model/model-")) for name in half)
        """
    )


def test_push_to_hub_of_models_and_pipelines(hub, client):
    client(
        """
        import vfmtok_hf
        from tests.pipelines.tiny_pipeline import tiny_dit_pipeline, tiny_pipeline

        pipe = tiny_pipeline()
        pipe.vq_model.push_to_hub("tester/pushed-model")
        pipe.image_processor.push_to_hub("tester/pushed-model")
        pipe.push_to_hub("tester/pushed-pipe")
        assert vfmtok_hf.VFMTokModel.from_pretrained("tester/pushed-model").config.image_size == 32
        assert vfmtok_hf.VFMTokImageProcessor.from_pretrained("tester/pushed-model").size == pipe.image_processor.size
        assert vfmtok_hf.VFMTokPipeline.from_pretrained("tester/pushed-pipe").id2label == pipe.id2label
        """
    )
    files = hub.repositories["tester/pushed-model"].files
    assert {"modeling_vfmtok.py", "configuration_vfmtok.py", "image_processing_vfmtok.py"} <= files.keys()
    assert json.loads(files["config.json"])["auto_map"]["AutoModel"] == "modeling_vfmtok.VFMTokModel"
    assert {"pipeline.py", "vq_model/component_vfmtok.py"} <= hub.repositories["tester/pushed-pipe"].files.keys()


def test_diffusion_pipelines_with_and_without_the_package(hub, tmp_path, client):
    torch.manual_seed(0)
    pipe = tiny_dit_pipeline(guidance=True)
    pipe.save_pretrained(tmp_path / "dit")
    noise = torch.randn(2, 4, 3, 3)
    sampling = {"num_inference_steps": 3, "guidance_scale": 1.5, "output_type": "latent"}
    save_file({"noise": noise, "latents": pipe([0, 3], latents=noise, **sampling).images}, tmp_path / "expected")
    code = f"""
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

expected = load_file({str(tmp_path / "expected")!r})
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "dit")!r}, trust_remote_code=True)
assert type(pipe).__module__.startswith(module), type(pipe)
torch.testing.assert_close(pipe([0, 3], latents=expected["noise"], **{sampling!r}).images, expected["latents"])
assert pipe.encode(torch.rand(1, 3, 32, 32)).shape == (1, 4, 3, 3)
pipe.save_pretrained("again")
again = DiffusionPipeline.from_pretrained("again", trust_remote_code=True)
torch.testing.assert_close(again([0, 3], latents=expected["noise"], **{sampling!r}).images, expected["latents"])
"""
    with Client(hub, tmp_path, packaged=False) as outside:
        outside("module = 'diffusers_modules.'" + code)
    client("module = 'vfmtok_hf.pipelines'" + code)


# -- folders, in this process


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return tiny_pipeline()


def test_shards_variants_and_dtypes(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded" / "vq_model").glob("model-*.safetensors"))) > 1
    loaded = VFMTokPipeline.from_pretrained(tmp_path / "sharded", dtype=torch.bfloat16)
    assert type(loaded.vq_model) is VFMTokModel
    assert {loaded.vq_model.dtype, loaded.transformer.dtype} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "again", variant="fp16")
    again = VFMTokPipeline.from_pretrained(
        tmp_path / "again", variant="fp16", dtype={"vq_model": torch.float32, "default": torch.float16}
    )
    assert (again.vq_model.dtype, again.transformer.dtype) == (torch.float32, torch.float16)
    assert type(again.image_processor) is VFMTokImageProcessor
    assert again.id2label == pipe.id2label


def test_saved_index_does_not_tell_where_the_pipeline_was_loaded_from(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    VFMTokPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    index = (tmp_path / "second" / "model_index.json").read_text()
    assert index == (tmp_path / "first" / "model_index.json").read_text()
    assert str(tmp_path) not in index


def test_pipelines_saved_by_diffusers_alone_load_too():
    """As the one in this package, whose index names modules of the package and which brings no code."""
    index = json.loads(open(f"{DEFAULT_CHECKPOINT}/model_index.json").read())
    assert index["vq_model"] == ["vfmtok_hf.modeling.modeling_vfmtok", "VFMTokModel"]
    assert type(VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT, transformer=None).vq_model) is VFMTokModel


def test_a_subclass_loads_what_its_base_has_saved(pipe, tmp_path):
    class Mine(VFMTokPipeline):
        pass

    pipe.save_pretrained(tmp_path / "base")
    mine = Mine.from_pretrained(tmp_path / "base")
    assert type(mine) is Mine
    mine.save_pretrained(tmp_path / "mine")
    assert type(Mine.from_pretrained(tmp_path / "mine")) is Mine
    with pytest.raises(ValueError, match="This is a Mine, not a VFMTokPipeline"):
        VFMTokPipeline.from_pretrained(tmp_path / "mine")


def test_device_map(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    for device_map in ("cpu", "balanced"):
        loaded = VFMTokPipeline.from_pretrained(tmp_path, device_map=device_map)
        assert loaded.tokenize(images).equal(pipe.tokenize(images))


@pytest.mark.parametrize(
    ("entry", "modules"),
    [
        ("pipeline", {"modeling_vfmtok.py", "pipeline_vfmtok.py", "loading_vfmtok.py"}),
        ("dit_pipeline", {"modeling_vfmae.py", "modeling_vfmtok_dit.py", "pipeline_vfmtok_dit.py"}),
    ],
)
def test_code_names_all_that_it_imports(entry, modules):
    """diffusers copies what the entered module names and no further, so that it must name all of it."""
    code = portable_code(entry)
    named = set(re.findall(r"^    from \.(\w+) import", code[f"{entry}.py"], re.MULTILINE))
    assert {f"{name}.py" for name in named} == code.keys() - {f"{entry}.py"}
    assert modules <= code.keys()
    imports = re.findall(r"^(?:from|import) (vfmtok_hf\S*)", "\n".join(code.values()), re.MULTILINE)
    assert imports == [], "top-level imports of a package that may not be installed"


def test_a_model_brings_only_what_it_needs(pipe, tmp_path):
    pipe.vq_model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == portable_code("modeling_vfmtok").keys()


# -- offloading


@pytest.fixture
def brought(monkeypatch):
    """Models in the order in which an offloading hook brings them to the device."""
    brought, pre_forward = [], CpuOffload.pre_forward

    def note(hook, module, *args, **kwargs):
        brought.append(type(module).__name__)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", note)
    return brought


def test_model_cpu_offload_runs_for_encode_and_decode(brought):
    """accelerate's hooks watch `forward` alone. Here the device to go to is the CPU: that the hooks run is what counts."""
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    tokens = pipe.vq_model.encode(torch.zeros(1, 3, 32, 32)).image_tokens
    pipe.vq_model.decode(image_tokens=tokens)
    assert brought == ["VFMTokModel"] * 2
    brought.clear()
    assert len(pipe([0, 1]).images) == 2
    assert brought[0] == "VFMTokARForImageGeneration"
    assert brought[-1] == "VFMTokModel"


def test_model_cpu_offload_of_the_diffusion_pipeline(brought):
    pipe = tiny_dit_pipeline(guidance=True)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.encode(torch.rand(1, 3, 32, 32))
    assert brought == ["VFMAEModel"]
    brought.clear()
    assert len(pipe(0, num_inference_steps=2, guidance_scale=2.0).images) == 1
    assert brought == ["VFMTokDiTForImageGeneration"] * 4 + ["VFMAEModel"]


@needs_gpu
def test_model_cpu_offload():
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload()
    tokens = pipe.tokenize(torch.rand(2, 3, 32, 32))
    assert tokens.is_cuda
    assert pipe.detokenize(tokens, "pt").shape == (2, 3, 32, 32)
    assert len(pipe([0, 1]).images) == 2
    assert {pipe.vq_model.device.type, pipe.transformer.device.type} == {"cpu"}, "freed after a call"


@needs_gpu
def test_device_map_on_an_accelerator(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for device_map in ("cuda", "balanced"):
        loaded = VFMTokPipeline.from_pretrained(tmp_path, device_map=device_map)
        assert loaded.vq_model.device.type == "cuda"
        assert len(loaded.reconstruct(torch.rand(2, 3, 32, 32)).images) == 2
        assert len(loaded([0, 1]).images) == 2
