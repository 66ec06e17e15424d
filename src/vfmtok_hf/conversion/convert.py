"""Convert original checkpoint files to Hugging Face folders."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from vfmtok_hf import __version__
from vfmtok_hf.data.fingerprints import file_sha256
from vfmtok_hf.data.output_files import check_model_folder, whole_folder
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor

from .build_models import Conversion, build_ar, build_dit, build_rar, build_tokenizer, build_vfmae
from .read_checkpoint import Weights, read_checkpoint, read_latent_statistics


PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True)
class ConversionReport:
    """
    Report of a conversion or of a dry run.

    Args:
        source, sha256: the original file.
        entry: the entry that was read (`"ema"`, `"model"`, ...); `None` for a bare state dict.
        keys_read: number of tensors read, including DINOv2.
        dropped: tensors left out, with the reason for each.
        num_parameters: number of elements of all tensors from the original files.
        dtypes: dtypes of the weights.
        config: configuration of the model.
        output: the written folder; `None` in a dry run.
    """

    source: Path
    sha256: str
    entry: str | None
    keys_read: int
    dropped: dict[str, str]
    num_parameters: int
    dtypes: tuple[str, ...]
    config: PreTrainedConfig
    output: Path | None

    def provenance(self) -> dict[str, str]:
        """The origin of the weights, for provenance.json."""
        return {
            "source file": self.source.name,
            "source sha256": self.sha256,
            "source entry": self.entry or "the whole file",
            "converted with": f"vfmtok-hf {__version__}",
        }

    def summary(self) -> str:
        """The report as a few lines of text."""
        entry = f"entry {self.entry!r}" if self.entry else "a bare state dict"
        lines = [
            f"read     {self.source} ({entry}, sha256 {self.sha256})",
            f"tensors  {self.keys_read}, of which dropped: {len(self.dropped)}",
            *(f"dropped  {key}: {reason}" for key, reason in self.dropped.items()),
            f"model    {self.config.model_type}, {self.num_parameters:,} parameters, {', '.join(self.dtypes)}",
            f"written  {self.output}" if self.output else "written  nothing (dry run)",
        ]
        return "\n".join(lines)


def convert_tokenizer(
    checkpoint: str | Path,
    output: str | Path,
    vision_checkpoint: str | Path | None = None,
    vision_model: str | Path | None = None,
    weights: Weights = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Convert an original tokenizer checkpoint to a folder for `VFMTokModel.from_pretrained`.

    Original files omit the vision model. If you do not pass one, the result is a light checkpoint, which decodes, and
    encodes after `VFMTokModel.load_vision_model`.

    Args:
        checkpoint: training checkpoint (`.pt`) of the original, or a state dict as `.pt`, `.bin` or `.safetensors`.
        output: folder to write.
        vision_checkpoint: original DINOv2 file (`dinov2_vitl14_reg4_pretrain.pth`).
        vision_model: alternatively, repository or folder of a transformers vision model.
        weights: `"ema"` for the moving averages, `"model"` for the weights of the last step.
        config: `VFMTokConfig` fields, or a JSON file with them, that cannot be inferred from shapes; `vision_config` may
            contain fields of the vision model's configuration.
        dry_run: do everything except downloading `vision_model`'s weights and writing.
        overwrite: replace an existing model folder.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        CheckpointError: the checkpoint is damaged, of another type, or does not match. It is a `ValueError`.
        FileExistsError, NotADirectoryError, PermissionError: the output cannot be written.
        ValueError: arguments are incompatible, or `config` lacks a required field.
    """
    return _convert_autoencoder(
        "tokenizer",
        build_tokenizer,
        checkpoint,
        output,
        vision_checkpoint,
        vision_model,
        weights,
        config,
        dry_run,
        overwrite,
    )


def convert_vfmae(
    checkpoint: str | Path,
    output: str | Path,
    vision_checkpoint: str | Path | None = None,
    vision_model: str | Path | None = None,
    latent_statistics: str | Path | None = None,
    weights: Weights = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Convert an original VFMAE checkpoint to a folder for `VFMAEModel.from_pretrained`.

    Arguments and errors as in `convert_tokenizer`; `config` holds fields of `VFMAEConfig`.

    Args:
        latent_statistics: mean and standard deviation of the latents, which denoisers need. `"released"` for those of the
            released autoencoder, or a file: the original's `stats-*.pt`, or a `.safetensors` file with `mean` and `std` of
            shape `(latent_channels, num_anchors)`.
    """
    statistics = None if latent_statistics is None else read_latent_statistics(latent_statistics)
    build = partial(build_vfmae, statistics=statistics)
    return _convert_autoencoder(
        "vfmae", build, checkpoint, output, vision_checkpoint, vision_model, weights, config, dry_run, overwrite
    )


def _convert_autoencoder(
    kind: str,
    build_model: Callable[..., Conversion],
    checkpoint: str | Path,
    output: str | Path,
    vision_checkpoint: str | Path | None,
    vision_model: str | Path | None,
    weights: Weights,
    config: Mapping[str, Any] | str | Path | None,
    dry_run: bool,
    overwrite: bool,
) -> ConversionReport:
    if vision_checkpoint is not None and vision_model is not None:
        raise ValueError("Pass vision_checkpoint or vision_model, not both.")

    def build(state_dict, overrides) -> Conversion:
        vision = None if vision_checkpoint is None else read_checkpoint(vision_checkpoint, "dinov2").state_dict
        return build_model(state_dict, overrides, vision, None if vision_model is None else str(vision_model))

    def save(conversion: Conversion, folder: Path) -> None:
        model = conversion.model
        if model.config.save_vision_model and model.vision_model is None:
            model.load_vision_model(str(vision_model))
        model.save_pretrained(folder)
        side = model.config.image_size
        VFMTokImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)

    return _convert(kind, checkpoint, output, weights, config, dry_run, overwrite, build, save)


def convert_ar(
    checkpoint: str | Path,
    output: str | Path,
    weights: Weights = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Convert an original next-token generator (`GPT-*.pt`) to a folder for `VFMTokARForImageGeneration.from_pretrained`.

    Arguments and errors as in `convert_tokenizer`; `config` contains fields of `VFMTokARConfig`.
    """
    return _convert("ar", checkpoint, output, weights, config, dry_run, overwrite, build_ar)


def convert_rar(
    checkpoint: str | Path,
    output: str | Path,
    weights: Weights = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Convert an original randomized-order generator (`.safetensors` or `.bin`) to a folder for
    `VFMTokRARForImageGeneration.from_pretrained`.

    Arguments and errors as in `convert_tokenizer`; `config` contains fields of `VFMTokRARConfig`.
    """
    return _convert("rar", checkpoint, output, weights, config, dry_run, overwrite, build_rar)


def convert_dit(
    checkpoint: str | Path,
    output: str | Path,
    weights: Weights = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Convert an original diffusion transformer (`DiTDH-*.pt`) to a folder for `VFMTokDiTForImageGeneration.from_pretrained`.

    Arguments and errors as in `convert_tokenizer`; `config` holds fields of `VFMTokDiTConfig`.
    """
    return _convert("dit", checkpoint, output, weights, config, dry_run, overwrite, build_dit)


def _save(conversion: Conversion, folder: Path) -> None:
    conversion.model.save_pretrained(folder)


def _convert(
    kind: str,
    checkpoint: str | Path,
    output: str | Path,
    weights: Weights,
    config: Mapping[str, Any] | str | Path | None,
    dry_run: bool,
    overwrite: bool,
    build: Callable[[dict, Mapping[str, Any]], Conversion],
    save: Callable[[Conversion, Path], None] = _save,
) -> ConversionReport:
    output, overrides = Path(output), _read_overrides(config)
    check_model_folder(output, overwrite)
    source = read_checkpoint(checkpoint, kind, weights)
    if output.resolve() in source.path.resolve().parents:
        raise FileExistsError(f"{output} contains the checkpoint itself: choose another output.")
    conversion = build(source.state_dict, overrides)
    state_dict = conversion.model.state_dict()
    report = ConversionReport(
        source=source.path,
        sha256=file_sha256(source.path),
        entry=source.entry,
        keys_read=conversion.keys_read,
        dropped=conversion.dropped,
        num_parameters=sum(tensor.numel() for tensor in state_dict.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()})),
        config=conversion.model.config,
        output=None if dry_run else output,
    )
    if not dry_run:
        with whole_folder(output, overwrite) as folder:
            save(conversion, folder)
            write_provenance(folder, report.provenance())
    return report


def write_provenance(folder: Path, facts: Mapping[str, str]) -> None:
    """Write provenance.json, which model cards show."""
    (folder / PROVENANCE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _read_overrides(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    try:
        overrides = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(overrides, dict):
        raise ValueError(f"{path} must contain a JSON object of configuration fields.")
    return overrides
