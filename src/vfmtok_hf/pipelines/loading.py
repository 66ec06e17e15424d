"""Loading pipelines in programs: the commands and the servers."""

import torch
from diffusers import DiffusionPipeline
from transformers import AutoConfig
from transformers.utils.hub import has_file

from vfmtok_hf.cpu.programs import prepare_cpu_program
from vfmtok_hf.pipelines.pipeline_vfmtok import VFMTokPipeline
from vfmtok_hf.pipelines.pipeline_vfmtok_dit import VFMTokDiTPipeline
from vfmtok_hf.pipelines.portable_vfmtok import class_name


SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load_pipeline(
    name_or_path: str,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    generates: bool = False,
    encodes: bool = False,
    reconstructs: bool = False,
) -> VFMTokPipeline | VFMTokDiTPipeline:
    """
    Load a pipeline on its device, without progress bars. On a CPU, prepare this process for it.

    Args:
        name_or_path (`str`): pipeline folder or repository.
        device (`str`, *optional*): device of the models. Defaults to the accelerator, if available.
        dtype (`str`): precision of the weights, such as `"bfloat16"` or `"bf16"`.
        generates (`bool`): load the generator. Otherwise an image tokenizer alone is enough.
        encodes (`bool`): load the vision model of a light tokenizer.
        reconstructs (`bool`): it may also be a continuous autoencoder, alone or in its pipeline.
    """
    torch_dtype = getattr(torch, SHORT_DTYPES.get(dtype, dtype))
    if generates:
        pipe = VFMTokPipeline.from_pretrained(name_or_path, dtype=torch_dtype)
    elif has_file(name_or_path, "config.json"):  # the root of a pipeline has none
        if reconstructs and AutoConfig.from_pretrained(name_or_path).model_type == "vfmae":
            pipe = VFMTokDiTPipeline.from_autoencoder(name_or_path, dtype=torch_dtype)
        else:
            pipe = VFMTokPipeline.from_image_tokenizer(name_or_path, dtype=torch_dtype)
    elif reconstructs and class_name(DiffusionPipeline.load_config(name_or_path)) == "VFMTokDiTPipeline":
        left_out = {"transformer": None, "guidance_transformer": None}
        pipe = VFMTokDiTPipeline.from_pretrained(name_or_path, dtype=torch_dtype, **left_out)
    else:
        pipe = VFMTokPipeline.from_pretrained(name_or_path, dtype=torch_dtype, transformer=None)
    if encodes and pipe.autoencoder.vision_model is None:
        pipe.autoencoder.load_vision_model()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if pipe.device.type == "cpu":
        prepare_cpu_program(pipe.autoencoder, pipe.transformer)
    return pipe


__all__ = ["load_pipeline"]
