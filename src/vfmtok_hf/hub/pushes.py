"""Upload a saved model, its card and its code to the Hub."""

import json
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from vfmtok_hf import __version__
from vfmtok_hf.conversion import convert_ar, convert_dit, convert_rar, convert_tokenizer, convert_vfmae
from vfmtok_hf.conversion.convert import PROVENANCE_FILE, write_provenance
from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.evaluation.results import Result, published_results
from vfmtok_hf.hub.cards import model_card, sample_grid
from vfmtok_hf.hub.released_checkpoints import ORIGINAL_REPOSITORY, Kind, find_released
from vfmtok_hf.hub.saved_models import MODELS_BY_TYPE, SavedModel, read_config, read_json, read_saved_model
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.pipelines import VFMTokDiTPipeline, VFMTokPipeline
from vfmtok_hf.pipelines.portable_vfmtok import portable_code, portable_pipeline


GENERATOR_CONVERTERS = {"ar": convert_ar, "rar": convert_rar, "dit": convert_dit}
# Stale weights in a repository, which loading might prefer to the new ones.
STALE_WEIGHTS = ["model*.safetensors*", "*/model*.safetensors*"]


class PushError(OSError):
    """A push failed. The message is one line with the reason."""


@dataclass(frozen=True)
class PushReport:
    """
    Report of a push or of a dry run.

    Args:
        repo_id: the repository.
        files: size in bytes of every uploaded file.
        left_out: files of the folder that do not belong to the model and are not uploaded.
        card: the content of README.md.
        commit_url: URL of the commit; `None` in a dry run.
    """

    repo_id: str
    files: dict[str, int]
    left_out: list[str]
    card: str
    commit_url: str | None

    def summary(self) -> str:
        """The report as text: files, and in a dry run the card."""
        lines = [f"{size / 1e6:10.2f} MB  {name}" for name, size in self.files.items()]
        lines.append(f"{sum(self.files.values()) / 1e6:10.2f} MB  in {len(self.files)} files for {self.repo_id}")
        if self.left_out:
            lines.append(f"left out because they are not part of the model: {', '.join(self.left_out)}")
        if self.commit_url:
            return "\n".join([*lines, f"pushed: {self.commit_url}"])
        return "\n".join([*lines, "", "README.md:", "", self.card, "", "nothing was uploaded (dry run)"])


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
    Publish a saved model or pipeline with its card and code, by `HfApi.upload_folder`.

    The uploaded code is that of this version, not the folder's. A README.md in the folder is published unchanged. Other
    files are uploaded if they belong to the model (`SavedModel.files`). Weights in the repository that are not in the
    folder are deleted in the same commit, so no stale shard remains.

    Args:
        folder: a folder written by `save_pretrained`.
        repo_id: `namespace/name`. The repository is created if it does not exist.
        license, base_model, metrics, results: as in `model_card`.
        samples: number of images to generate for the card of a pipeline.
        private: visibility of a new repository.
        token: defaults to the one of `hf auth login`.
        dry_run: do everything without using the network.

    Raises:
        FileNotFoundError, ValueError: the folder does not contain a complete VFMTok model, or `repo_id` is invalid.
        PushError: the Hub refused, the connection failed, or someone else committed in the meantime. Push again to
            continue: uploaded files are not sent twice.
    """
    validate_repo_id(repo_id)
    saved = read_saved_model(folder)
    if samples and not saved.index:
        raise ValueError(f"Samples need a pipeline, but {folder} contains a model of type {saved.kind!r}.")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        stage(saved, staged)
        pictures = None
        if samples:
            png, caption = sample_grid(folder, samples)
            write(staged / "samples.png", png)
            pictures = {"samples.png": caption}
        readme = staged / "README.md"
        if not readme.exists():
            card = model_card(folder, repo_id, license, base_model, metrics, pictures, results)
            write(readme, str(card).encode())
        files = [file for file in sorted(staged.rglob("*")) if file.is_file()]
        sizes = {file.relative_to(staged).as_posix(): file.stat().st_size for file in files}
        report = PushReport(
            repo_id=repo_id,
            files=sizes,
            left_out=[name for name in saved.other_files() if name not in sizes],
            card=readme.read_text(encoding="utf-8"),
            commit_url=None,
        )
        return report if dry_run else replace(report, commit_url=upload(HfApi(token=token), repo_id, staged, private))


def stage(saved: SavedModel, folder: Path) -> None:
    """Stage a repository in an empty folder: links to the model's files, and the code of this version."""
    for name, file in saved.files.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(file.resolve())
        except OSError:  # Windows without developer mode
            shutil.copyfile(file, link)
    for name, text in published_code(saved).items():
        write(folder / name, text.encode())


def write(file: Path, content: bytes) -> None:
    """Write a file of a staged repository, replacing a link instead of writing through it."""
    with whole_file(file) as temporary:
        temporary.write_bytes(content)


def published_code(saved: SavedModel) -> dict[str, str]:
    """The code of this version, and the configurations that name it, by their path in the repository."""
    code = portable_pipeline(saved.index) if saved.index else {}
    for part, config in saved.configs.items():
        model_class = MODELS_BY_TYPE[config["model_type"]]
        classes = {"AutoConfig": model_class.config_class, "AutoModel": model_class}
        code |= code_of_a_part(f"{part}/config.json", config, classes)
    for path in saved.files:
        if path.endswith("preprocessor_config.json"):
            config = read_json(saved.folder / path)
            code |= code_of_a_part(path, config, {"AutoImageProcessor": VFMTokImageProcessor})
    return code


def code_of_a_part(path: str, config: Mapping[str, Any], classes: Mapping[str, type]) -> dict[str, str]:
    """A configuration whose `auto_map` names the classes, and their modules."""
    modules = {cls: cls.__module__.split(".")[-1] for cls in classes.values()}
    auto_map = {name: f"{modules[cls]}.{cls.__name__}" for name, cls in classes.items()}
    folder, _, file_name = path.strip("/").rpartition("/")
    files = {file_name: json.dumps({**config, "auto_map": auto_map}, indent=2) + "\n"}
    files |= portable_code(*modules.values())
    return {f"{folder}/{name}".strip("/"): text for name, text in files.items()}


def upload(api: HfApi, repo_id: str, folder: Path, private: bool) -> str:
    """Upload a folder to a repository, which is created if necessary. Returns the URL of the commit."""
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Upload with vfmtok-hf {__version__}",
            parent_commit=api.repo_info(repo_id).sha,  # the Hub refuses if someone else committed in the meantime
            delete_patterns=STALE_WEIGHTS,
        )
        return commit.commit_url
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # Errors of single files have the Hub's response as their cause.
        answer = error if isinstance(error, HTTPError) else error.__cause__ or error
        reason = " ".join(str(answer).split()) or type(answer).__name__
        if is_unreachable(error):
            reason = f"the Hub cannot be reached ({reason}). Check the connection and push again."
        raise PushError(f"The push to {repo_id} failed: {reason}") from error


def is_unreachable(error: BaseException | None) -> bool:
    """Whether there was no connection, which the libraries in between wrap in errors of their own."""
    while error is not None:
        if isinstance(error, (socket.gaierror, ConnectionError, TimeoutError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def push_checkpoint(
    checkpoint: str | Path,
    repo_id: str,
    kind: Kind,
    vision_model: str | None = None,
    tokenizer: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    latent_statistics: str | Path | None = None,
    **options: Any,
) -> PushReport:
    """
    Convert an original checkpoint and publish it.

    Args:
        checkpoint: file of the original code. If its path ends with a released path, such as
            `originals/DINOv2/GPT-B/GPT-B-300e.pt`, the card shows the authors' figures.
        repo_id: `namespace/name`.
        kind: `"tokenizer"`, `"vfmae"`, `"ar"`, `"rar"` or `"dit"`.
        vision_model: repository or folder of the vision model of a tokenizer or VFMAE, to include it.
        tokenizer: repository or folder of a generator's image tokenizer, or of a diffusion transformer's VFMAE, to publish
            both as a pipeline.
        config: configuration fields that cannot be inferred from shapes, as in `vfmtok_hf.conversion`.
        latent_statistics: of a VFMAE, as in `convert_vfmae`.
        options: arguments of `push`. A dry run also converts.

    Raises:
        CheckpointError: as in `vfmtok_hf.conversion`.
        FileNotFoundError, ValueError, PushError: as in `push`, or for options that do not belong to `kind`.
    """
    validate_repo_id(repo_id)
    if vision_model is not None and kind in GENERATOR_CONVERTERS:
        raise ValueError(f"vision_model belongs to a tokenizer or VFMAE; a checkpoint of kind {kind!r} has none.")
    if tokenizer is not None and kind not in GENERATOR_CONVERTERS:
        raise ValueError(f"tokenizer belongs to a generator; a checkpoint of kind {kind!r} has none.")
    if latent_statistics is not None and kind != "vfmae":
        raise ValueError(f"latent_statistics belong to a VFMAE; a checkpoint of kind {kind!r} has none.")
    released = find_released(checkpoint)
    if released is not None:
        options = {"base_model": ORIGINAL_REPOSITORY, **options}
        options["results"] = [*published_results(released.published_as), *options.get("results", ())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if kind == "tokenizer":
            convert_tokenizer(checkpoint, folder, vision_model=vision_model, config=config)
        elif kind == "vfmae":
            convert_vfmae(
                checkpoint, folder, vision_model=vision_model, latent_statistics=latent_statistics, config=config
            )
        else:
            GENERATOR_CONVERTERS[kind](checkpoint, folder, config=config)
        if tokenizer is not None:
            folder = join_pipeline(folder, tokenizer, Path(temporary) / "pipeline")
        return push(folder, repo_id, **options)


def join_pipeline(generator: Path, tokenizer: str, folder: Path) -> Path:
    """Write a converted generator and an image tokenizer, a folder or repository, as a pipeline. Returns its folder."""
    config = read_config(generator / "config.json")
    transformer = MODELS_BY_TYPE[config["model_type"]].from_pretrained(generator)
    if config["model_type"] == "vfmtok_dit":
        half: Any = VFMTokDiTPipeline.from_autoencoder(tokenizer, dtype="auto")
    else:
        half = VFMTokPipeline.from_image_tokenizer(tokenizer, dtype="auto")
    type(half)(**{**half.components, "transformer": transformer}).save_pretrained(folder)
    facts = read_json(generator / PROVENANCE_FILE)
    if not Path(tokenizer).exists():  # a local path is of no use to others
        facts["image tokenizer"] = tokenizer
    write_provenance(folder, facts)
    return folder


__all__ = ["PushError", "PushReport", "push", "push_checkpoint"]
