"""Publishing on the Hub: model cards, and pushes that change a repository whole or not at all."""

import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from vfmtok_hf.conversion import convert_ar, convert_rar, convert_tokenizer
from vfmtok_hf.conversion.convert import PROVENANCE_FILE, write_provenance
from vfmtok_hf.evaluation.results import (
    Result,
    card_metrics,
    published_and_measured,
    published_results,
    results_table,
)
from vfmtok_hf.hub.released_checkpoints import ORIGINAL_REPOSITORY, Kind, find_released
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.pipelines import VFMTokPipeline
from vfmtok_hf.pipelines.portable_vfmtok import MODEL_CLASSES, portable_code, portable_pipeline, saved_components
from vfmtok_hf.plotting import image_grid


CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PAPER = "https://arxiv.org/abs/2507.08441"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
GENERATOR_CONVERTERS = {"ar": convert_ar, "rar": convert_rar}
MODELS_BY_TYPE = {model_class.config_class.model_type: model_class for model_class in MODEL_CLASSES}


# ---------------------------------------------------------------------------------------------------------------
# What a saved folder holds


@dataclass(frozen=True)
class SavedModel:
    """
    A folder that `save_pretrained` wrote, found complete.

    Args:
        folder: the folder.
        kind: `"pipeline"`, or the `model_type` of its model.
        configs: config.json of the model (under `""`) or of each of a pipeline's models (under its name).
        index: model_index.json of a pipeline, else empty.
        num_weights: elements of all tensors, buffers included and variants left out.
    """

    folder: Path
    kind: str
    configs: dict[str, dict[str, Any]]
    index: dict[str, Any]
    num_weights: int


def read_saved_model(folder: str | Path) -> SavedModel:
    """
    Look at a folder without loading its weights.

    Raises:
        FileNotFoundError: there is no such folder, or a file of its model is missing.
        ValueError: a file is damaged or truncated, or the model is none of VFMTok's.
    """
    folder = Path(folder)
    index = {}
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        parts = [name for name, cls in saved_components(index).items() if cls != VFMTokImageProcessor.__name__]
    elif (folder / "config.json").is_file():
        parts = [""]
    else:
        raise FileNotFoundError(f"{folder} has neither model_index.json nor config.json: give a saved model's folder.")
    configs = {part: _read_config(folder / part / "config.json") for part in parts}
    if not index and configs[""]["model_type"] == "vfmtok" and not (folder / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no preprocessor_config.json: save a VFMTokImageProcessor there, too.")
    return SavedModel(
        folder=folder,
        kind="pipeline" if index else configs[""]["model_type"],
        configs=configs,
        index=index,
        num_weights=sum(_count_weights(folder / part) for part in parts),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if config.get("model_type") not in MODELS_BY_TYPE:
        known = ", ".join(MODELS_BY_TYPE)
        raise ValueError(f"{path} is of a model of type {config.get('model_type')!r}; VFMTok's are {known}.")
    return config


def _count_weights(folder: Path) -> int:
    index = folder / "model.safetensors.index.json"
    shards = set(_read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return sum(_count_elements(folder / shard) for shard in shards)


def _count_elements(weights: Path) -> int:
    try:
        with safe_open(weights, framework="pt") as file:
            # Shapes come from the header, to which opening compares the file's size.
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{weights} is missing.") from error
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged or truncated ({error}).") from error


# ---------------------------------------------------------------------------------------------------------------
# Model cards


USAGE = {
    "pipeline": """\
from vfmtok_hf import VFMTokPipeline

pipe = VFMTokPipeline.from_pretrained("{repo_id}")
image = pipe({label}).images[0]""",
    "vfmtok": """\
from vfmtok_hf import VFMTokPipeline

pipe = VFMTokPipeline.from_image_tokenizer("{repo_id}"){fetch_for_pipe}
image_tokens = pipe.tokenize("photo.png")
reconstruction = pipe.detokenize(image_tokens)[0]""",
    "vfmtok_ar": """\
import torch
from vfmtok_hf import VFMTokARForImageGeneration

generator = VFMTokARForImageGeneration.from_pretrained("{repo_id}")
image_tokens = generator.generate(torch.tensor([0]))""",
    "vfmtok_rar": """\
import torch
from vfmtok_hf import VFMTokRARForImageGeneration

generator = VFMTokRARForImageGeneration.from_pretrained("{repo_id}")
image_tokens = generator.generate(torch.tensor([0]))""",
}
GENERATOR_USAGE_WITHOUT_PACKAGE = """\
import torch
from transformers import AutoModel

generator = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
image_tokens = generator.generate(torch.tensor([0]))"""
USAGE_WITHOUT_PACKAGE = {
    "pipeline": """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
image = pipe({label}).images[0]""",
    "vfmtok": """\
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True){fetch_for_model}
pixel_values = processor("photo.png", return_tensors="pt")["pixel_values"]
image_tokens = model.encode(pixel_values).image_tokens
reconstruction = processor.postprocess(model.decode(image_tokens).reconstruction)[0]""",
    "vfmtok_ar": GENERATOR_USAGE_WITHOUT_PACKAGE,
    "vfmtok_rar": GENERATOR_USAGE_WITHOUT_PACKAGE,
}
DESCRIPTIONS = {
    "pipeline": "A VFMTok image tokenizer and a generator of its tokens: class labels to images, without "
    "classifier-free guidance unless asked for.",
    "vfmtok": "A VFMTok image tokenizer: images to image tokens and back, on the features of a frozen vision model.",
    "vfmtok_ar": "A generator of VFMTok image tokens for class labels, one after the other in raster order.",
    "vfmtok_rar": "A generator of VFMTok image tokens for class labels, trained in randomized order.",
}


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
    README.md of a repository.

    Args:
        folder: saved model or pipeline. Its provenance.json, which conversion writes, goes into the card.
        repo_id: the repository it is for.
        license: of the weights, as the Hub abbreviates it.
        base_model: repository that the weights come from.
        metrics: fields of `huggingface_hub.EvalResult`, at least `metric_type`, `metric_name`, `metric_value`,
            `dataset_type` and `dataset_name`. They become the card's `model-index`.
        pictures: caption by file name. Default: every picture in the folder, under its own name.
        results: published and measured figures, of `vfmtok_hf.evaluation.results`. The card shows them in columns of
            their own; they become part of the `model-index`.

    Raises:
        FileNotFoundError, ValueError: the folder does not hold a complete model of VFMTok's.
        TypeError: a metric lacks a field or has an unknown one.
    """
    saved = read_saved_model(folder)
    task = "image-feature-extraction" if saved.kind == "vfmtok" else "unconditional-image-generation"
    name = repo_id.split("/")[-1]
    plain = [EvalResult(**{"task_type": task, **metric}) for metric in metrics]
    card_data = ModelCardData(
        license=license,
        library_name="diffusers" if saved.kind == "pipeline" else "transformers",
        pipeline_tag=task,
        tags=["vfmtok", "image-tokenizer" if saved.kind == "vfmtok" else "class-conditional", "arxiv:2507.08441"],
        base_model=base_model,
        model_name=name,
        eval_results=[*plain, *card_metrics(results)] or None,
    )
    if pictures is None:
        files = [file.name for file in sorted(saved.folder.iterdir()) if file.suffix.lower() in PICTURES]
        pictures = {file: Path(file).stem.replace("_", " ") for file in files}
    snippet_values = _snippet_values(saved, repo_id)
    return ModelCard.from_template(
        card_data,
        template_str=CARD_TEMPLATE.read_text(encoding="utf-8"),
        model_name=name,
        license=license,
        paper=PAPER,
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
    light = saved.kind == "vfmtok" and not saved.configs[""].get("save_vision_model", True)
    names = [name.split(",")[0].strip() for name in (saved.index.get("id2label") or {}).values()]
    unique = [name for name, count in Counter(names).items() if count == 1]
    return {
        "repo_id": repo_id,
        "label": json.dumps(unique[0] if unique else 0, ensure_ascii=False),
        "fetch_for_pipe": "\npipe.vq_model.load_vision_model()" if light else "",
        "fetch_for_model": "\nmodel.load_vision_model()" if light else "",
    }


def _facts(saved: SavedModel) -> dict[str, str]:
    facts = {"weights": f"{saved.num_weights:,}"}
    for config in saved.configs.values():
        if config["model_type"] == "vfmtok":
            facts["images"] = f"{config['image_size']} x {config['image_size']} pixels"
            facts["image tokens"] = f"{config['num_anchors']} of a codebook of {config['codebook_size']}"
            facts["vision model"] = config["vision_config"]["model_type"]
        else:
            facts["generator"] = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}"
            facts["classes"] = str(config["num_classes"])
    return facts


def _provenance(saved: SavedModel) -> dict[str, str]:
    file = saved.folder / PROVENANCE_FILE
    facts = _read_json(file) if file.is_file() else {}
    return {**facts, "published with": f"vfmtok-hf {version('vfmtok-hf')}"}


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """
    Figures for `model_card` from a JSON list of them.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it does not hold what the card needs.
    """
    metrics = _read_json(Path(file))
    try:
        for metric in metrics:
            EvalResult(**{"task_type": "", **metric})
    except TypeError as error:
        raise ValueError(f"{file} must hold a list of objects with the fields of a model-index: {error}.") from error
    return metrics


def draw_samples(folder: str | Path, count: int) -> tuple[bytes, str]:
    """
    A picture of `count` samples of the pipeline saved in `folder` as PNG, and its caption: seeds from 0, none picked,
    no guidance.

    Classes follow each other from 0, and begin again after the last.
    """
    pipe = VFMTokPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    class_ids = [index % pipe.transformer.config.num_classes for index in range(count)]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
    names = [pipe.id2label.get(class_id, str(class_id)).split(",")[0] for class_id in class_ids]
    buffer = io.BytesIO()
    image_grid(pipe(class_ids, generator=seeds).images, min(count, 8), names).save(buffer, "PNG")
    return buffer.getvalue(), f"Samples of seeds 0 to {count - 1}, none picked, without guidance"


# ---------------------------------------------------------------------------------------------------------------
# Pushing


class PushError(OSError):
    """A push that failed. The message is one line, and says what has become of the repository: it is as it was."""


@dataclass(frozen=True)
class PushReport:
    """
    What a push did, or in a dry run would do.

    Args:
        repo_id: the repository.
        files: size in bytes of every file that it gets.
        card: its README.md.
        commit_url: the one commit; `None` in a dry run.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    commit_url: str | None

    def summary(self) -> str:
        """The report for people: files, and in a dry run the card."""
        lines = [f"{size / 1e6:10.2f} MB  {name}" for name, size in self.files.items()]
        lines.append(f"{sum(self.files.values()) / 1e6:10.2f} MB  in {len(self.files)} files for {self.repo_id}")
        if self.commit_url:
            return "\n".join([*lines, f"pushed: {self.commit_url}"])
        return "\n".join([*lines, "", "README.md:", "", self.card, "", "nothing was sent (dry run)"])


def push(
    folder: str | Path,
    repo_id: str,
    license: str = "apache-2.0",
    base_model: str | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    samples: int = 0,
    private: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    results: Sequence[Result] = (),
) -> PushReport:
    """
    Publish a saved model or pipeline with its card and code, in one commit: the repository changes whole or not at all.

    The code is that of this version, whatever the folder holds. A README.md in the folder is published as it is. Weights
    that the repository holds and the folder does not go in the same commit, so that no stale shard stays.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: `namespace/name`.
        license, base_model, metrics, results: as in `model_card`.
        samples: number of images to draw for the card of a pipeline.
        private: visibility of a repository made by this push.
        token: defaults to the one of `hf auth login`.
        dry_run: do everything but use the network.

    Raises:
        FileNotFoundError, ValueError: the folder does not hold a complete model of VFMTok's; a bad `repo_id`.
        PushError: the Hub refused, or the connection failed. A repository made by this push is gone again.
    """
    validate_repo_id(repo_id)
    saved = read_saved_model(folder)
    if samples and saved.kind != "pipeline":
        raise ValueError(f"Samples are drawn by pipelines, and {folder} holds a model of type {saved.kind!r}.")
    contents = _contents(saved)
    pictures = None
    if samples:
        contents["samples.png"], caption = draw_samples(folder, samples)
        pictures = {"samples.png": caption}
    if "README.md" not in contents:
        card = model_card(folder, repo_id, license, base_model, metrics, pictures, results)
        contents["README.md"] = str(card).encode()
    readme = contents["README.md"]
    report = PushReport(
        repo_id=repo_id,
        files={name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in contents.items()},
        card=(readme if isinstance(readme, bytes) else readme.read_bytes()).decode(),
        commit_url=None,
    )
    if dry_run:
        return report
    return replace(report, commit_url=_commit(HfApi(token=token), repo_id, contents, private))


def _contents(saved: SavedModel) -> dict[str, Path | bytes]:
    """The files to publish by their path in the repository: those of the folder, and the code of this version."""
    contents: dict[str, Path | bytes] = {
        file.relative_to(saved.folder).as_posix(): file
        for file in sorted(saved.folder.rglob("*"))
        if file.is_file() and not any(part.startswith((".", "__")) for part in file.relative_to(saved.folder).parts)
    }
    code = portable_pipeline(saved.index) if saved.index else {}
    for part, config in saved.configs.items():
        model_class = MODELS_BY_TYPE[config["model_type"]]
        prefix = f"{part}/" if part else ""
        auto_map = {"AutoConfig": _reference(model_class.config_class), "AutoModel": _reference(model_class)}
        code[f"{prefix}config.json"] = json.dumps({**config, "auto_map": auto_map}, indent=2) + "\n"
        code |= {f"{prefix}{name}": text for name, text in portable_code(_module(model_class)).items()}
    for path in [path for path in contents if path.endswith("preprocessor_config.json")]:
        prefix = path.removesuffix("preprocessor_config.json")
        config = _read_json(saved.folder / path)
        auto_map = {"AutoImageProcessor": _reference(VFMTokImageProcessor)}
        code[path] = json.dumps({**config, "auto_map": auto_map}, indent=2) + "\n"
        code |= {f"{prefix}{name}": text for name, text in portable_code(_module(VFMTokImageProcessor)).items()}
    return contents | {path: text.encode() for path, text in sorted(code.items())}


def _module(cls: type) -> str:
    return cls.__module__.split(".")[-1]


def _reference(cls: type) -> str:
    """How an `auto_map` names a class."""
    return f"{_module(cls)}.{cls.__name__}"


def _commit(api: HfApi, repo_id: str, contents: Mapping[str, Path | bytes], private: bool) -> str:
    """Make one commit of the files, in a new repository or on top of an existing one. Returns the commit's address."""
    made, before = False, None
    try:
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private)
            made = True
        before = api.repo_info(repo_id).sha
        stale = [name for name in api.list_repo_files(repo_id) if ".safetensors" in name and name not in contents]
        additions = [CommitOperationAdd(name, file) for name, file in contents.items()]
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=f"Upload with vfmtok-hf {version('vfmtok-hf')}",
            parent_commit=before,  # if somebody else commits meanwhile, the Hub refuses
        )
        return commit.commit_url
    except BaseException as error:
        state = _undo(api, repo_id, before) if made else "it is as it was"
        if not isinstance(error, (HTTPError, OSError, RuntimeError, ValueError)):
            raise
        # Errors of single files have the Hub's answer as their cause.
        answer = error if isinstance(error, HTTPError) else error.__cause__ or error
        reason = " ".join(str(answer).split()) or type(answer).__name__
        raise PushError(f"The push to {repo_id} failed, and {state}: {reason}") from error


def _undo(api: HfApi, repo_id: str, before: str | None) -> str:
    """Delete the repository that a failed push made, unless a commit has arrived there. Says what became of it."""
    try:
        if before is None or api.repo_info(repo_id).sha == before:
            api.delete_repo(repo_id)
            return "the repository it had made is deleted again"
    except (HTTPError, OSError):
        pass
    return "the repository it had made remains: look at it, and delete it if it is of no use"


def push_checkpoint(
    checkpoint: str | Path,
    repo_id: str,
    kind: Kind,
    vision_model: str | None = None,
    tokenizer: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    **options: Any,
) -> PushReport:
    """
    Convert an original checkpoint and publish it.

    Args:
        checkpoint: file of the original code. One under its released path, such as
            `originals/DINOv2/GPT-B/GPT-B-300e.pt`, gets its authors' figures into the card.
        repo_id: `namespace/name`.
        kind: `"tokenizer"`, `"ar"` or `"rar"`.
        vision_model: repository or folder of the tokenizer's vision model, to include it.
        tokenizer: repository or folder of a generator's image tokenizer, to publish both as a pipeline.
        config: configuration fields that shapes cannot tell, as in `vfmtok_hf.conversion`.
        options: those of `push`. A dry run converts as well.

    Raises:
        CheckpointError: as in `vfmtok_hf.conversion`.
        FileNotFoundError, ValueError, PushError: as in `push`; options that do not belong to `kind`.
    """
    validate_repo_id(repo_id)
    if vision_model is not None and kind != "tokenizer":
        raise ValueError(f"vision_model belongs to a tokenizer; a checkpoint of kind {kind!r} has none.")
    if tokenizer is not None and kind == "tokenizer":
        raise ValueError("tokenizer belongs to a generator; this checkpoint is a tokenizer itself.")
    released = find_released(checkpoint)
    if released is not None:
        options = {"base_model": ORIGINAL_REPOSITORY, **options}
        if released.published_as is not None:
            options["results"] = [*published_results(released.published_as), *options.get("results", ())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if kind == "tokenizer":
            convert_tokenizer(checkpoint, folder, vision_model=vision_model, config=config)
        else:
            GENERATOR_CONVERTERS[kind](checkpoint, folder, config=config)
        if tokenizer is not None:
            folder = _join_pipeline(folder, tokenizer, Path(temporary) / "pipeline")
        return push(folder, repo_id, **options)


def _join_pipeline(generator: Path, tokenizer: str, folder: Path) -> Path:
    config = _read_config(generator / "config.json")
    transformer = MODELS_BY_TYPE[config["model_type"]].from_pretrained(generator)
    half = VFMTokPipeline.from_image_tokenizer(tokenizer, dtype="auto")
    VFMTokPipeline(half.vq_model, transformer, half.image_processor).save_pretrained(folder)
    facts = _read_json(generator / PROVENANCE_FILE)
    if not Path(tokenizer).exists():  # where it lies on this machine is of no use to others
        facts["image tokenizer"] = tokenizer
    write_provenance(folder, facts)
    return folder


__all__ = [
    "PushError",
    "PushReport",
    "SavedModel",
    "draw_samples",
    "model_card",
    "push",
    "push_checkpoint",
    "read_metrics",
    "read_saved_model",
]
