"""`vfmtok convert`: one command per type of checkpoint."""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vfmtok_hf.cli.options import (
    one_line_errors,
    output_console,
    output_option,
    quiet_libraries,
    report_written,
    resolve_model,
)


if TYPE_CHECKING:
    from vfmtok_hf.conversion import ConversionReport


convert_app = typer.Typer(
    help="Convert checkpoints of the original code to Hugging Face folders.", no_args_is_help=True
)


CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="Checkpoint of the original code: `.pt`, `.bin` or `.safetensors`.")
]
FolderOption = Annotated[Path, output_option("Folder to write.")]
VisionCheckpointOption = Annotated[Path | None, typer.Option(help="Original DINOv2 checkpoint to include.")]
VisionModelOption = Annotated[
    str | None, typer.Option(help="Repository or folder of a transformers vision model to include.")
]
WeightsOption = Annotated[
    Literal["ema", "model"], typer.Option(help="Use the moving averages or the weights of the last step.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="JSON object of configuration fields that cannot be inferred from shapes."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would happen, without writing anything.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")]


TokenizerOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or repository of the converted image tokenizer: the output is then a pipeline of both.",
        show_default=False,
    ),
]


@convert_app.command("tokenizer")
def convert_tokenizer(
    checkpoint: CheckpointOption,
    output: FolderOption,
    vision_checkpoint: VisionCheckpointOption = None,
    vision_model: VisionModelOption = None,
    weights: WeightsOption = "ema",
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert an image tokenizer. Without a vision model, the result can decode, and encode after you load one."""
    with one_line_errors():
        check_paths(checkpoint, output, dry_run, overwrite)

        from vfmtok_hf import conversion

        report = conversion.convert_tokenizer(
            checkpoint, output, vision_checkpoint, vision_model, weights, config, dry_run, overwrite
        )
        print_report(report)


@convert_app.command("vfmae")
def convert_vfmae(
    checkpoint: CheckpointOption,
    output: FolderOption,
    vision_checkpoint: VisionCheckpointOption = None,
    vision_model: VisionModelOption = None,
    latent_statistics: Annotated[
        Path | None,
        typer.Option(help="Mean and deviation of the latents, which denoisers need: `released`, or a file."),
    ] = None,
    weights: WeightsOption = "ema",
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert the continuous autoencoder of VFMTok2. Without a vision model, the result can decode, and encode after you load one."""
    with one_line_errors():
        check_paths(checkpoint, output, dry_run, overwrite)

        from vfmtok_hf import conversion

        report = conversion.convert_vfmae(
            checkpoint,
            output,
            vision_checkpoint,
            vision_model,
            latent_statistics,
            weights,
            config,
            dry_run,
            overwrite,
        )
        print_report(report)


@convert_app.command("ar")
def convert_ar(
    checkpoint: CheckpointOption,
    output: FolderOption,
    tokenizer: TokenizerOption = None,
    weights: WeightsOption = "ema",
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert a next-token generator (GPT-B to GPT-3B)."""
    convert_generator("ar", checkpoint, output, tokenizer, weights, config, dry_run, overwrite)


@convert_app.command("rar")
def convert_rar(
    checkpoint: CheckpointOption,
    output: FolderOption,
    tokenizer: TokenizerOption = None,
    weights: WeightsOption = "ema",
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert a randomized-order generator (RAR-L to RAR-XXL)."""
    convert_generator("rar", checkpoint, output, tokenizer, weights, config, dry_run, overwrite)


def convert_generator(
    kind: str,
    checkpoint: Path,
    output: Path,
    tokenizer: str | None,
    weights: str,
    config: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Convert a generator of either type, alone or to a pipeline."""
    with one_line_errors():
        check_paths(checkpoint, output, dry_run, overwrite)

        from vfmtok_hf import conversion

        convert = {"ar": conversion.convert_ar, "rar": conversion.convert_rar}[kind]
        if tokenizer is None or dry_run:
            print_report(convert(checkpoint, output, weights, config, dry_run, overwrite))
            return

        from vfmtok_hf.data.output_files import whole_folder
        from vfmtok_hf.hub.pushes import join_pipeline

        with TemporaryDirectory() as temporary, whole_folder(output, overwrite) as folder:
            generator = Path(temporary) / "generator"
            report = convert(checkpoint, generator, weights, config, False, False)
            join_pipeline(generator, resolve_model(tokenizer), folder)
        print_report(dataclasses.replace(report, output=output))
        report_written(1, "pipeline", output)


def check_paths(checkpoint: Path, output: Path, dry_run: bool, overwrite: bool) -> None:
    """Raise, before anything is loaded, if there is no such file or the output cannot be written."""
    from vfmtok_hf.data.output_files import check_model_folder

    if not checkpoint.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {checkpoint}.")
    if not dry_run:
        if output.resolve() in checkpoint.resolve().parents:
            raise FileExistsError(f"{output} contains the checkpoint itself: choose another output.")
        check_model_folder(output, overwrite)
    quiet_libraries()


@convert_app.command("dit")
def convert_dit(
    checkpoint: CheckpointOption,
    output: FolderOption,
    weights: WeightsOption = "ema",
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert the diffusion transformer of VFMTok2 (DiTDH-XL)."""
    with one_line_errors():
        check_paths(checkpoint, output, dry_run, overwrite)

        from vfmtok_hf import conversion

        print_report(conversion.convert_dit(checkpoint, output, weights, config, dry_run, overwrite))


def print_report(report: "ConversionReport") -> None:
    output_console.print(report.summary(), markup=False, highlight=False, soft_wrap=True)
