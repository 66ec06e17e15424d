"""Fine-tune trained models, in full or with low-rank adapters, and save a pipeline."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModel
from transformers.utils.hub import has_file

from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
from vfmtok_hf.training.checkpoints import save_model, whole_run_folder


if TYPE_CHECKING:
    from peft import PeftModel

Generator = VFMTokARForImageGeneration | VFMTokRARForImageGeneration

LORA_TARGETS = {
    "vfmtok_ar": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "vfmtok_rar": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "modulation"],
}


def load_tokenizer(name_or_path: str) -> VFMTokModel:
    """
    Load an image tokenizer in float32, from a folder or repository of a tokenizer or a pipeline.

    Raises:
        ValueError: it is another type of model.
    """
    return _load_component(name_or_path, "vq_model", (VFMTokModel,)).eval()


def load_generator(name_or_path: str) -> Generator:
    """The same for a generator of either type."""
    return _load_component(name_or_path, "transformer", (VFMTokARForImageGeneration, VFMTokRARForImageGeneration))


def _load_component(name_or_path: str, component: str, classes: tuple[type, ...]):
    # The root folder of a pipeline has no config.json.
    subfolder = "" if has_file(name_or_path, "config.json") else component
    # Files may be in half precision, but averages and updates need float32.
    model = AutoModel.from_pretrained(name_or_path, subfolder=subfolder, dtype=torch.float32)
    if not isinstance(model, classes):
        expected = " or ".join(cls.__name__ for cls in classes)
        raise ValueError(f"{name_or_path} contains a {type(model).__name__}, expected a {expected} or a pipeline.")
    return model


def is_pipeline(name_or_path: str) -> bool:
    return has_file(name_or_path, "model_index.json")


def add_lora(model: Generator, rank: int, alpha: float, dropout: float) -> "PeftModel":
    """
    Freeze a generator except for low-rank updates of its linear layers (arXiv 2106.09685) and its class embeddings, which
    are trained in full. The adapters are added to `model` in place.

    Args:
        rank (`int`): rank of the updates.
        alpha (`float`): the updates are scaled by `alpha / rank`.
        dropout (`float`): dropout rate of the updates' input in training.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs the package peft: pip install "vfmtok-hf[train]".') from error

    table, first = model.class_embedding_table()
    if first == 0:
        embeddings = {"modules_to_save": ["class_embedding"]}
    else:  # The table also contains the image tokens, which stay frozen.
        embeddings = {"trainable_token_indices": {"embed_tokens": list(range(first, len(table.weight)))}}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LORA_TARGETS[model.config.model_type],
        **embeddings,
    )
    return get_peft_model(model, config)


def save_adapted(adapted: "PeftModel", folder: Path, adapter_folder: Path) -> None:
    """Save the model with merged adapters, which loads without peft, and the adapters alone."""
    with whole_run_folder(adapter_folder) as temporary:
        # By default, peft contacts the Hub to check whether the base model has other embeddings.
        adapted.save_pretrained(temporary, save_embedding_layers=False)
    save_model(copy.deepcopy(adapted).merge_and_unload(), folder)


def save_pipeline(tokenizer: VFMTokModel, generator_folder: Path, folder: Path) -> None:
    """Save a pipeline of a tokenizer and a saved generator, atomically."""
    from vfmtok_hf.pipelines import VFMTokPipeline  # diffusers takes seconds to import

    size = tokenizer.config.image_size
    processor = VFMTokImageProcessor(size={"height": size, "width": size})
    pipe = VFMTokPipeline(tokenizer, load_generator(str(generator_folder)), processor)
    with whole_run_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
