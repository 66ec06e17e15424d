"""Importing the package is light, and whatever is imported next, transformers' registries have its classes."""

import multiprocessing
import subprocess
import sys

import pytest


# Processes that have imported nothing but what takes part in no registration, and takes seconds.
APART = multiprocessing.get_context("forkserver")
APART.set_forkserver_preload(["torchvision"])

# Ways into transformers and into this package that meet in the middle of one another's imports.
FIRST_IMPORTS = (
    "from transformers import AutoModel, pipeline; import vfmtok_hf",
    "import vfmtok_hf; from transformers import PreTrainedModel",
    "import vfmtok_hf; import transformers.modeling_layers",
    "import vfmtok_hf; from transformers import Trainer",
    "import vfmtok_hf; from diffusers import DiffusionPipeline",
    "import vfmtok_hf.modeling.modeling_vfmtok_ar",
    "import vfmtok_hf.modeling.modeling_vfmtok_rar",
    "import vfmtok_hf.modeling.modeling_vfmae",
    "import vfmtok_hf.modeling.modeling_vfmtok_dit",
    "import vfmtok_hf.modeling.image_tokens_vfmtok",
    "import vfmtok_hf.pipelines",
)
REGISTERED = """
from transformers import CONFIG_MAPPING, IMAGE_PROCESSOR_MAPPING, MODEL_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
import vfmtok_hf as v

for config, model in (
    (v.VFMTokConfig, v.VFMTokModel),
    (v.VFMTokARConfig, v.VFMTokARForImageGeneration),
    (v.VFMTokRARConfig, v.VFMTokRARForImageGeneration),
    (v.VFMAEConfig, v.VFMAEModel),
    (v.VFMTokDiTConfig, v.VFMTokDiTForImageGeneration),
):
    assert CONFIG_MAPPING[config.model_type] is config
    assert MODEL_MAPPING[config] is model
    assert (config._auto_class, model._auto_class) == ("AutoConfig", "AutoModel")
for config in (v.VFMTokConfig, v.VFMAEConfig):
    registered = IMAGE_PROCESSOR_MAPPING[config]  # a dictionary in transformers since 5.4, a tuple before
    assert v.VFMTokImageProcessor in getattr(registered, "values", lambda: registered)()
assert PIPELINE_REGISTRY.check_task("image-tokens")[1]["impl"] is v.VFMTokImageTokensPipeline
"""


def run_apart(code: str) -> None:
    process = APART.Process(target=exec, args=(code, {}))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_classes_are_registered_whatever_is_imported_first(first):
    run_apart(first + REGISTERED)


@pytest.mark.parametrize(
    "look_up",
    [
        "from transformers import CONFIG_MAPPING; CONFIG_MAPPING['vfmtok_ar']",
        "from transformers import CONFIG_MAPPING, MODEL_MAPPING; MODEL_MAPPING[CONFIG_MAPPING['vfmtok_rar']]",
        "from transformers import CONFIG_MAPPING, IMAGE_PROCESSOR_MAPPING as M; M[CONFIG_MAPPING['vfmtok']]",
        "from transformers.pipelines import PIPELINE_REGISTRY; PIPELINE_REGISTRY.check_task('image-tokens')",
    ],
)
def test_one_registry_alone_is_enough(look_up):
    run_apart(f"import vfmtok_hf; {look_up}")


def test_models_come_without_what_they_do_not_need():
    """transformers itself imports torchvision and accelerate where they are installed."""
    others = "diffusers", "gradio", "kernels", "timm", "peft", "datasets"
    run_apart(f"from vfmtok_hf import VFMTokModel\nimport sys\nassert not set({others!r}) & set(sys.modules)")


@pytest.mark.parametrize("start", ["import vfmtok_hf", "import vfmtok_hf.cli"])
def test_neither_import_nor_command_line_wait_for_torch(start):
    heavy = "torch", "transformers", "diffusers", "accelerate", "gradio", "kernels", "timm", "torchvision", "numpy"
    code = f"{start}\nimport sys\nassert not set({heavy!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
