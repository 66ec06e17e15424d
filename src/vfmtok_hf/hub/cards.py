"""Create the model card (README.md) of a repository from a saved model."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vfmtok_hf import __version__
from vfmtok_hf.conversion.convert import PROVENANCE_FILE
from vfmtok_hf.data.output_files import is_picture
from vfmtok_hf.evaluation.results import Result, card_metrics, published_and_measured, results_table
from vfmtok_hf.hub.saved_models import MODELS_BY_TYPE, SavedModel, read_json, read_saved_model
from vfmtok_hf.modeling.class_names_vfmtok import ClassNames, short_class_name
from vfmtok_hf.pipelines import VFMTokDiTPipeline, VFMTokPipeline
from vfmtok_hf.pipelines.component_vfmtok import AUTOENCODERS
from vfmtok_hf.plotting import image_grid


CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PIPELINES = {pipeline.__name__: pipeline for pipeline in (VFMTokPipeline, VFMTokDiTPipeline)}


@dataclass(frozen=True)
class Paper:
    """What a card says of the paper whose architecture a model has."""

    architecture: str
    arxiv_id: str
    citation_key: str
    title: str
    authors: str
    year: int


VFMTOK_PAPER = Paper(
    "VFMTok",
    "2507.08441",
    "zheng2025vfmtok",
    "Vision Foundation Models as Effective Visual Tokenizers for Autoregressive Image Generation",
    "Zheng, Anlin and Wen, Xin and Zhang, Xuanyang and Ma, Chuofan and Wang, Tiancai and Yu, Gang and Zhang, Xiangyu and "
    "Qi, Xiaojuan",
    2025,
)
VFMTOK2_PAPER = Paper(
    "VFMTok2",
    "2605.18390",
    "zheng2026vfmtok2",
    "Vision Foundation Models as Generalist Tokenizers for Image Generation",
    "Zheng, Anlin and Han, Qi and Wen, Xin and Ma, Chuofan and Gong, Lanxi and Yu, Gang and Zhang, Xiangyu and Qi, Xiaojuan",
    2026,
)
VFMTOK2_KINDS = ("vfmae", "vfmtok_dit", "VFMTokDiTPipeline")

GENERATOR_USAGE = """\
import torch
from vfmtok_hf import {class_name}

generator = {class_name}.from_pretrained("{repo_id}")
image_tokens = generator.generate(torch.tensor([0]))"""
USAGE = {
    "VFMTokPipeline": """\
from vfmtok_hf import VFMTokPipeline

pipe = VFMTokPipeline.from_pretrained("{repo_id}")
image = pipe({label}).images[0]""",
    "VFMTokDiTPipeline": """\
from vfmtok_hf import VFMTokDiTPipeline

pipe = VFMTokDiTPipeline.from_pretrained("{repo_id}")
image = pipe({label}).images[0]""",
    "vfmtok": """\
from vfmtok_hf import VFMTokPipeline

pipe = VFMTokPipeline.from_image_tokenizer("{repo_id}"){fetch_for_pipe}
image_tokens = pipe.tokenize("photo.png")
reconstruction = pipe.detokenize(image_tokens)[0]""",
    "vfmtok_ar": GENERATOR_USAGE,
    "vfmtok_rar": GENERATOR_USAGE,
    "vfmae": """\
from vfmtok_hf import VFMTokDiTPipeline

pipe = VFMTokDiTPipeline.from_autoencoder("{repo_id}"){fetch_for_pipe}
latents = pipe.encode("photo.png")
reconstruction = pipe.decode(latents)[0]""",
    "vfmtok_dit": """\
import torch
from vfmtok_hf import VFMTokDiTForImageGeneration

transformer = VFMTokDiTForImageGeneration.from_pretrained("{repo_id}")
noise = torch.randn(1, *transformer.config.latent_shape)
velocity = transformer(noise, torch.ones(1), torch.tensor([0])).velocity""",
}
GENERATOR_USAGE_WITHOUT_PACKAGE = """\
import torch
from transformers import AutoModel

generator = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
image_tokens = generator.generate(torch.tensor([0]))"""
PIPELINE_USAGE_WITHOUT_PACKAGE = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
image = pipe({label}).images[0]"""
USAGE_WITHOUT_PACKAGE = {
    "VFMTokPipeline": PIPELINE_USAGE_WITHOUT_PACKAGE,
    "VFMTokDiTPipeline": PIPELINE_USAGE_WITHOUT_PACKAGE,
    "vfmtok": """\
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True){fetch_for_model}
pixel_values = processor("photo.png", return_tensors="pt")["pixel_values"]
image_tokens = model.encode(pixel_values).image_tokens
reconstruction = processor.postprocess(model.decode(image_tokens).reconstruction)[0]""",
    "vfmtok_ar": GENERATOR_USAGE_WITHOUT_PACKAGE,
    "vfmtok_rar": GENERATOR_USAGE_WITHOUT_PACKAGE,
    "vfmae": """\
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True){fetch_for_model}
latents = model.encode(processor("photo.png", return_tensors="pt")["pixel_values"]).latents
reconstruction = processor.postprocess(model.decode(latents).reconstruction)[0]""",
    "vfmtok_dit": """\
import torch
from transformers import AutoModel

transformer = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
noise = torch.randn(1, *transformer.config.latent_shape)
velocity = transformer(noise, torch.ones(1), torch.tensor([0])).velocity""",
}
DESCRIPTIONS = {
    "VFMTokPipeline": "A VFMTok pipeline that generates images from class labels, without classifier-free guidance by default. "
    "It contains an image tokenizer and a generator of its tokens.",
    "VFMTokDiTPipeline": "A VFMTok2 pipeline that generates images from class labels by diffusion, without guidance by "
    "default. It contains a continuous autoencoder and a diffusion transformer on its latents.",
    "vfmtok": "A VFMTok image tokenizer. It encodes images to image tokens with a frozen vision model, and decodes them.",
    "vfmtok_ar": "A class-conditional generator of VFMTok image tokens in raster order.",
    "vfmtok_rar": "A class-conditional generator of VFMTok image tokens, trained in random order.",
    "vfmae": "VFMAE, the continuous autoencoder of VFMTok2. It encodes images to latents with a frozen vision model, and "
    "decodes them.",
    "vfmtok_dit": "A class-conditional diffusion transformer on the latents of VFMAE.",
}
TAGS = {"vfmtok": "image-tokenizer", "vfmae": "autoencoder"}


def model_card(
    folder: str | Path,
    repo_id: str,
    license: str = "apache-2.0",
    base_model: str | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    pictures: Mapping[str, str] | None = None,
    results: Sequence[Result] = (),
) -> ModelCard:
    """
    Create the model card of a repository.

    Args:
        folder: saved model or pipeline. The card includes the provenance.json that conversion writes.
        repo_id: name of the repository.
        license: license of the weights, in the Hub's notation.
        base_model: repository from which the weights are derived.
        metrics: fields of `huggingface_hub.EvalResult`, at least `metric_type`, `metric_name`, `metric_value`,
            `dataset_type` and `dataset_name`. They become the card's `model-index`.
        pictures: captions by file name. By default all images in the folder, captioned by their names.
        results: published and measured figures from `vfmtok_hf.evaluation.results`. The card shows them in separate
            columns, and they are added to the `model-index`.

    Raises:
        FileNotFoundError, ValueError: the folder does not contain a complete VFMTok model.
        TypeError: a metric has a missing or an unknown field.
    """
    saved = read_saved_model(folder)
    task = "image-feature-extraction" if saved.kind in AUTOENCODERS else "unconditional-image-generation"
    paper = VFMTOK2_PAPER if saved.kind in VFMTOK2_KINDS else VFMTOK_PAPER
    name = repo_id.split("/")[-1]
    plain = [EvalResult(**{"task_type": task, **metric}) for metric in metrics]
    card_data = ModelCardData(
        license=license,
        library_name="diffusers" if saved.index else "transformers",
        pipeline_tag=task,
        tags=["vfmtok", TAGS.get(saved.kind, "class-conditional"), f"arxiv:{paper.arxiv_id}"],
        base_model=base_model,
        model_name=name,
        eval_results=[*plain, *card_metrics(results)] or None,
    )
    if pictures is None:
        names = [Path(name) for name in saved.files if "/" not in name]
        pictures = {name.name: name.stem.replace("_", " ") for name in names if is_picture(name)}
    snippet_values = _snippet_values(saved, repo_id)
    return ModelCard.from_template(
        card_data,
        template_str=CARD_TEMPLATE.read_text(encoding="utf-8"),
        model_name=name,
        license=license,
        paper=paper,
        description=DESCRIPTIONS[saved.kind],
        pictures=pictures,
        usage=USAGE[saved.kind].format(**snippet_values),
        usage_without_package=USAGE_WITHOUT_PACKAGE[saved.kind].format(**snippet_values),
        facts=_facts(saved),
        metrics=plain,
        results_table=results_table(*published_and_measured(results)) if results else "",
        provenance=_provenance(saved),
    )


def _snippet_values(saved: SavedModel, repo_id: str) -> dict[str, Any]:
    light = saved.kind in AUTOENCODERS and not saved.configs[""].get("save_vision_model", True)
    classes = ClassNames(saved.index.get("id2label") or {})
    names = [short_class_name(classes.id2label, class_id) for class_id in classes.id2label]
    unique = [name for name in names if len(classes.ids(name)) == 1]
    return {
        "repo_id": repo_id,
        "class_name": "" if saved.index else MODELS_BY_TYPE[saved.kind].__name__,
        "label": json.dumps(unique[0] if unique else 0, ensure_ascii=False),
        "fetch_for_pipe": "\npipe.autoencoder.load_vision_model()" if light else "",
        "fetch_for_model": "\nmodel.load_vision_model()" if light else "",
    }


def _facts(saved: SavedModel) -> dict[str, str]:
    facts = {"parameters": f"{saved.num_weights:,}"}
    for config in saved.configs.values():
        if config["model_type"] in AUTOENCODERS:
            facts["images"] = f"{config['image_size']} x {config['image_size']} pixels"
            if config["model_type"] == "vfmtok":
                facts["image tokens"] = f"{config['num_anchors']} of a codebook of {config['codebook_size']}"
            else:
                facts["latents"] = f"{config['num_anchors']} of {config['latent_channels']} channels"
            facts["vision model"] = vision_model_name(config)
        else:
            facts["generator"] = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}"
            facts["classes"] = str(config["num_classes"])
    return facts


def vision_model_name(config: Mapping[str, Any]) -> str:
    """What a tokenizer's configuration says of its vision model: its repository, else timm's name, else its family."""
    vision_config = config["vision_config"]
    names = (config.get("vision_model_name_or_path"), vision_config.get("architecture"), vision_config["model_type"])
    return next(name for name in names if name)


def _provenance(saved: SavedModel) -> dict[str, str]:
    file = saved.folder / PROVENANCE_FILE
    facts = read_json(file) if file.is_file() else {}
    return {**facts, "published with": f"vfmtok-hf {__version__}"}


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """
    Read metrics for `model_card` from a JSON list.

    Raises:
        FileNotFoundError, ValueError: the file does not exist or lacks a required field.
    """
    metrics = read_json(Path(file))
    try:
        for metric in metrics:
            EvalResult(**{"task_type": "", **metric})
    except TypeError as error:
        raise ValueError(
            f"{file} must be a JSON list of objects with the fields of a model-index: {error}."
        ) from error
    return metrics


def sample_grid(folder: str | Path, count: int) -> tuple[bytes, str]:
    """
    Generate `count` samples with the pipeline in `folder`, without guidance, and return a PNG grid and its caption.

    Sample i has seed i and class i modulo the number of classes.
    """
    pipe = PIPELINES[read_saved_model(folder).kind].from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    class_ids = [index % pipe.transformer.config.num_classes for index in range(count)]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
    names = [short_class_name(pipe.id2label, class_id) for class_id in class_ids]
    buffer = io.BytesIO()
    image_grid(pipe(class_ids, generator=seeds).images, min(count, 8), names).save(buffer, "PNG")
    return buffer.getvalue(), f"Samples of seeds 0 to {count - 1}, not cherry-picked, without guidance"


__all__ = ["model_card", "read_metrics", "sample_grid"]
