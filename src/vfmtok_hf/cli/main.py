"""
The `vfmtok` command.

Exit codes: 0 done, 1 failed with one line on stderr, 2 wrong usage. Commands import what they need when they run, so
that `--help` stays quick.
"""

import math
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer.core
from rich.markup import escape
from rich.table import Table

from vfmtok_hf.cli.evaluate import evaluate_app
from vfmtok_hf.cli.options import (
    BatchSizeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImagesArgument,
    ModelOption,
    load_pipeline,
    one_line_errors,
    output_console,
    progress,
    report_skipped,
    report_written,
    resolve_model,
)


if TYPE_CHECKING:
    from vfmtok_hf.conversion import ConversionReport


app = typer.Typer(
    name="vfmtok",
    help="VFMTok: images to image tokens and back, and images from class labels.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(
    help="Convert checkpoints of the original code to Hugging Face folders.", no_args_is_help=True
)
app.add_typer(convert_app, name="convert")
app.add_typer(evaluate_app, name="evaluate")


# ---------------------------------------------------------------------------------------------------------------
# What words after an option mean


class ManyLabelsCommand(typer.core.TyperCommand):
    """A command without positional arguments whose `--labels` takes every word up to the next option."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        option = ""
        repeated: list[str] = []
        for argument in args:
            if argument.startswith("-"):
                option = argument.partition("=")[0]
            elif option in ("--labels", "-l") and repeated[-1] != option:
                repeated.append(option)
            repeated.append(argument)
        return super().parse_args(ctx, repeated)


class Crops(str, Enum):
    """Views of a training image."""

    random = "random"
    ten = "ten"
    center = "center"


class GraphFormat(str, Enum):
    """What to write graphs as."""

    onnx = "onnx"
    torch = "torch"


class GraphPart(str, Enum):
    """The graphs of a pipeline."""

    encoder = "encoder"
    decoder = "decoder"
    decode_step = "decode_step"


class Weights(str, Enum):
    """Which weights of a training checkpoint."""

    ema = "ema"
    model = "model"


PicturesOption = Annotated[
    Path, typer.Option("--output", "-o", help="A picture for one grid, or a folder for single files.")
]


# ---------------------------------------------------------------------------------------------------------------
# Commands


@app.command(cls=ManyLabelsCommand)
def generate(
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", "-l", metavar="NAME|ID...", help="Classes. *Default: one image of each.*"),
    ] = None,
    num_images_per_label: Annotated[int, typer.Option("--num-images-per-label", "-n", min=1)] = 1,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    temperature: Annotated[float | None, typer.Option(help="*Default: the checkpoint's.*")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off. *Default: the checkpoint's.*")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 is off. *Default: the checkpoint's.*")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i is drawn from seed + i, whatever the batch size.")] = 0,
    output: PicturesOption = Path("grid.png"),
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """
    Draw images of classes.

    `vfmtok generate --labels smiley heart --seed 0 --output grid.png`
    """
    with one_line_errors():
        from torch import Generator

        from vfmtok_hf.cpu.packing import AdaptiveThreads
        from vfmtok_hf.data.output_files import check_picture_output, picture_output

        check_picture_output(output)
        pipe = load_pipeline(model, device, dtype, generates=True)
        class_ids = pipe.get_label_ids(labels or range(pipe.transformer.config.num_classes))
        class_ids = [class_id for class_id in class_ids for _ in range(num_images_per_label)]
        num_steps = math.ceil(len(class_ids) / batch_size) * pipe.transformer.config.num_image_tokens
        columns = num_images_per_label if num_images_per_label > 1 else None
        with (
            picture_output(output, columns) as add,
            progress("Drawing", num_steps) as advance,
            AdaptiveThreads() as threads,
        ):

            def after_step(*_) -> None:
                threads()
                advance(1)

            for start in range(0, len(class_ids), batch_size):
                batch = class_ids[start : start + batch_size]
                images = pipe(
                    batch,
                    guidance_scale=guidance_scale,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=[Generator().manual_seed(seed + start + index) for index in range(len(batch))],
                    callback_on_step_end=after_step,
                ).images
                for index, (class_id, image) in enumerate(zip(batch, images, strict=True), start):
                    name = pipe.id2label.get(class_id, str(class_id)).partition(",")[0].strip()
                    slug = re.sub(r"\W+", "-", name).strip("-")
                    add(image, f"{index:05d}-{slug}.png", name)
        report_written(len(class_ids), "image", output)


@app.command()
def tokenize(
    images: ImagesArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="`.safetensors`, or `.npy` with the names in a file beside it.")
    ] = Path("tokens.safetensors"),
    skip_errors: Annotated[bool, typer.Option(help="Report images that cannot be used, and go on.")] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """Images to image tokens. Folders are read batch by batch."""
    with one_line_errors():
        import torch

        from vfmtok_hf.data.output_files import check_output_file
        from vfmtok_hf.data.token_files import check_suffix, find_images, save_tokens, tokenize_files

        check_suffix(output)
        check_output_file(output)
        files = find_images(images)
        pipe = load_pipeline(model, device, dtype, encodes=True)
        names, parts = [], []
        with progress("Tokenizing", len(files)) as advance:
            on_error = report_skipped if skip_errors else None
            for batch_names, image_tokens in tokenize_files(pipe, files, batch_size, on_error):
                names += batch_names
                parts.append(image_tokens.cpu())
                advance(batch_size)
        if not names:
            raise ValueError("None of the images can be used.")
        save_tokens(output, names, torch.cat(parts))
        report_written(len(names), "tokenized image", output)


@app.command()
def detokenize(
    tokens: Annotated[Path, typer.Argument(help="File of image tokens, as of `vfmtok tokenize`.", show_default=False)],
    output: PicturesOption = Path("images"),
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels. *Default: the model's.*")] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """Image tokens to images."""
    with one_line_errors():
        from vfmtok_hf.data.output_files import check_picture_output, picture_output
        from vfmtok_hf.data.token_files import load_tokens, picture_name

        check_picture_output(output)
        names, image_tokens = load_tokens(tokens)
        file_names = [picture_name(name) for name in names]
        pipe = load_pipeline(model, device, dtype)
        with picture_output(output) as add, progress("Decoding", len(names)) as advance:
            for start in range(0, len(names), batch_size):
                images = pipe.detokenize(image_tokens[start : start + batch_size], size=size)
                for index, image in enumerate(images, start):
                    add(image, file_names[index], names[index])
                advance(len(images))
        report_written(len(names), "image", output)


@app.command()
def reconstruct(
    images: ImagesArgument,
    output: PicturesOption = Path("reconstructions.png"),
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """Images through their image tokens and back: originals beside reconstructions, and the PSNR of each."""
    with one_line_errors():
        from torchvision.transforms.functional import to_pil_image

        from vfmtok_hf.data.output_files import check_picture_output, picture_output
        from vfmtok_hf.data.token_files import find_images, picture_name, tokenize_files
        from vfmtok_hf.evaluation.reconstruction import psnr
        from vfmtok_hf.plotting import image_grid

        check_picture_output(output)
        files = find_images(images)
        pipe = load_pipeline(model, device, dtype, encodes=True)
        decibels = {}
        with picture_output(output) as add, progress("Reconstructing", len(files)) as advance:
            for names, image_tokens in tokenize_files(pipe, files, batch_size):
                crops = pipe.image_processor(
                    [files[name] for name in names],
                    size=pipe.vq_model.config.image_size,
                    do_rescale=False,
                    do_normalize=False,
                    return_tensors="pt",
                )["pixel_values"]
                reconstructions = pipe.detokenize(image_tokens, "uint8", batch_size=batch_size).cpu()
                for name, value, crop, reconstruction in zip(
                    names, psnr(crops, reconstructions).tolist(), crops, reconstructions, strict=True
                ):
                    decibels[name] = value
                    pair = [to_pil_image(crop), to_pil_image(reconstruction)]
                    add(image_grid(pair, 2, [name, f"{value:.1f} dB"]), picture_name(name), "")
                advance(len(names))
        print_psnr(decibels)
        report_written(len(decibels), "pair", output)


def print_psnr(decibels: dict[str, float]) -> None:
    table = Table("image", "PSNR (dB)", show_footer=len(decibels) > 1)
    table.columns[0].footer, table.columns[1].footer = "mean", f"{sum(decibels.values()) / len(decibels):.2f}"
    table.columns[1].justify = "right"
    for name, value in decibels.items():
        table.add_row(escape(name), f"{value:.2f}")
    output_console.print(table)


@app.command("extract-tokens")
def extract_tokens(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, or what the `datasets` library reads: parquet, arrow, `.tar`, a repository.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the shards. An unfinished one goes on.")],
    crops: Annotated[Crops, typer.Option(help="Views of each image.")] = Crops.random,
    variants: Annotated[int, typer.Option(min=1, help="Random crops of each image.")] = 4,
    crop_scale: Annotated[
        tuple[float, float], typer.Option(help="Range of their side, as a share of the image's shorter side.")
    ] = (0.8, 1.0),
    horizontal_flip: Annotated[
        bool, typer.Option(help="Mirror half of them, or add the central one's mirror image.")
    ] = True,
    neighbours: Annotated[int, typer.Option(min=1, help="2 adds the second-nearest codebook rows (VFMTok-RAR).")] = 1,
    split: Annotated[str, typer.Option(help="Of what the `datasets` library reads.")] = "train",
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a file.")] = 4096,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    model: ModelOption = None,
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 32,
) -> None:
    """
    Labelled images to token shards for the training of generators.

    Several processes: `torchrun --nproc_per_node N -m vfmtok_hf.training.extract_tokens`.
    """
    with one_line_errors():
        from vfmtok_hf.cli.environment import default_device
        from vfmtok_hf.training.extract_tokens import extract_tokens
        from vfmtok_hf.training.finetuning import load_tokenizer
        from vfmtok_hf.training.images import Variants
        from vfmtok_hf.training.sources import open_records

        records = open_records(data, split)
        tokenizer = load_tokenizer(resolve_model(model)).to(device or default_device())
        views = Variants(
            tokenizer.config.image_size,
            crops.value,
            variants,
            crop_scale,
            horizontal_flip=horizontal_flip,
            seed=seed,
        )
        with progress("Tokenizing", len(records)) as advance:
            index = extract_tokens(
                tokenizer, records, output, views, neighbours, shard_size, batch_size, on_progress=advance
            )
        for name in index["unreadable"]:
            report_skipped(name)
        report_written(index["num_images"], "tokenized image", output)


@app.command()
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("export"),
    format: Annotated[
        GraphFormat, typer.Option("--format", "-f", help="ONNX files, or `torch.export` programs (`.pt2`).")
    ] = GraphFormat.onnx,
    parts: Annotated[
        list[GraphPart] | None, typer.Option("--part", "-p", help="May be repeated. *Default: all there are.*")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="The graphs' only batch size. *Default: any.*")] = None,
    model: ModelOption = None,
) -> None:
    """
    Models as graphs that run without this package, compared with the models before they appear.

    `vfmtok export --format onnx --output emoji-onnx`
    """
    with one_line_errors():
        from transformers.utils.hub import has_file

        from vfmtok_hf.export.pipeline import check_export, export_pipeline

        check_export(output, format.value)
        names = parts and [part.value for part in parts]
        is_pipeline = not has_file(resolve_model(model), "config.json")
        pipe = load_pipeline(
            model,
            "cpu",
            Dtype.float32,
            generates=is_pipeline and (parts is None or GraphPart.decode_step in parts),
            encodes=parts is None or GraphPart.encoder in parts,
        )
        exported = export_pipeline(pipe, output, format.value, names, batch_size)
        for part in exported:
            text = f"{part.file.name}  {part.size / 1e6:.1f} MB  {part.check}"
            output_console.print(text, markup=False, highlight=False, soft_wrap=True)
        report_written(len(exported), "graph", output)


@app.command()
def info(model: ModelOption = None) -> None:
    """Versions, device, kernel, and what the checkpoint holds."""
    with one_line_errors():
        from vfmtok_hf.cli.environment import checkpoint_facts, environment_facts

        print_facts(environment_facts())
        print_facts(checkpoint_facts(resolve_model(model)))


def print_facts(facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        output_console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture. *Default: `curves.png` in the first run.*")
    ] = None,
) -> None:
    """Curves of losses and metrics over the steps of training runs, those of several runs in one picture."""
    with one_line_errors():
        from vfmtok_hf.data.output_files import check_output_file
        from vfmtok_hf.training.plot import plot_runs

        picture = output or runs[0] / "curves.png"
        check_output_file(picture)
        report_written(plot_runs(runs, picture), "curve", picture)


# ---------------------------------------------------------------------------------------------------------------
# Publishing


class CheckpointKind(str, Enum):
    """What an original checkpoint holds."""

    tokenizer = "tokenizer"
    ar = "ar"
    rar = "rar"


@app.command()
def push(
    source: Annotated[Path, typer.Argument(help="Folder of a saved model; with `--convert` a file of the original.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPOSITORY", help="Such as `you/vfmtok-ar-b`.")],
    convert: Annotated[CheckpointKind | None, typer.Option(help="Convert the original checkpoint first.")] = None,
    vision_model: Annotated[
        str | None, typer.Option(help="With `--convert tokenizer`: vision model to include, a repository or folder.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With a generator: image tokenizer to publish along, as a pipeline.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With `--convert`: JSON object of fields that shapes cannot tell.")
    ] = None,
    license: Annotated[str, typer.Option(help="Of the weights, as the Hub abbreviates it.")] = "apache-2.0",
    base_model: Annotated[str | None, typer.Option(help="Repository that the weights come from.")] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="JSON list of figures for the card, in the fields of the Hub's `model-index`.")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Result of `vfmtok evaluate` for the card. *May be repeated.*")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Images to draw for the card of a pipeline.")] = 0,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything, show files and card, and send nothing.")
    ] = False,
) -> None:
    """
    Publish a model with its card and code, in one commit.

    `vfmtok push runs/mine/model you/mine --dry-run`
    """
    with one_line_errors():
        from vfmtok_hf import hub
        from vfmtok_hf.evaluation.results import measured_results

        # What is not given on the command line is left to what is known of the checkpoint.
        given = {"license": license, "base_model": base_model, "metrics": metrics and hub.read_metrics(metrics)}
        options = {name: value for name, value in given.items() if value is not None}
        options["results"] = [figure for file in results or [] for figure in measured_results(file)]
        options |= {"samples": samples, "private": private, "dry_run": dry_run}
        if convert is not None:
            report = hub.push_checkpoint(source, repo_id, convert.value, vision_model, tokenizer, config, **options)
        elif (vision_model, tokenizer, config) == (None, None, None):
            report = hub.push(source, repo_id, **options)
        else:
            raise ValueError("--vision-model, --tokenizer and --config go with --convert.")
        output_console.print(report.summary(), markup=False, highlight=False, soft_wrap=True)


@app.command("publish-plan")
def publish_plan(
    namespace: Annotated[str, typer.Argument(help="User or organization to publish under.")],
    ask_hub: Annotated[bool, typer.Option("--ask-hub", help="Ask the Hub for the sizes of the originals.")] = False,
) -> None:
    """What publishing every checkpoint that the authors released takes: sizes, and the commands to type."""
    with one_line_errors():
        from vfmtok_hf.hub.released_checkpoints import publish_plan

        for row in publish_plan(namespace, ask_hub):
            size = (
                "size not asked"
                if not ask_hub
                else "not found"
                if row.source_bytes is None
                else gigabytes(row.source_bytes)
            )
            target = f"{row.target} ({gigabytes(row.target_bytes)})" if row.target else "no model of this package"
            lines = [f"{row.source} ({size}) -> {target}", *(f"    {command}" for command in row.commands)]
            output_console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


# ---------------------------------------------------------------------------------------------------------------
# vfmtok convert


CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="The original's file: `.pt`, `.bin` or `.safetensors`.")
]
FolderOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
WeightsOption = Annotated[Weights, typer.Option(help="Moving averages, or the last step's weights.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="JSON object of configuration fields that shapes cannot tell.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would happen, and write nothing.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")]


@convert_app.command("tokenizer")
def convert_tokenizer(
    checkpoint: CheckpointOption,
    output: FolderOption,
    vision_checkpoint: Annotated[Path | None, typer.Option(help="Original DINOv2 file to include.")] = None,
    vision_model: Annotated[
        str | None, typer.Option(help="Instead: repository or folder of a transformers vision model.")
    ] = None,
    weights: WeightsOption = Weights.ema,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """The image tokenizer. Without a vision model the result decodes, and encodes once it is given one."""
    with one_line_errors():
        from vfmtok_hf import conversion

        report = conversion.convert_tokenizer(
            checkpoint, output, vision_checkpoint, vision_model, weights.value, config, dry_run, overwrite
        )
        print_report(report)


@convert_app.command("ar")
def convert_ar(
    checkpoint: CheckpointOption,
    output: FolderOption,
    weights: WeightsOption = Weights.ema,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """A next-token generator (GPT-B to GPT-3B)."""
    with one_line_errors():
        from vfmtok_hf import conversion

        print_report(conversion.convert_ar(checkpoint, output, weights.value, config, dry_run, overwrite))


@convert_app.command("rar")
def convert_rar(
    checkpoint: CheckpointOption,
    output: FolderOption,
    weights: WeightsOption = Weights.ema,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """A randomized-order generator (RAR-L to RAR-XXL)."""
    with one_line_errors():
        from vfmtok_hf import conversion

        print_report(conversion.convert_rar(checkpoint, output, weights.value, config, dry_run, overwrite))


def print_report(report: "ConversionReport") -> None:
    output_console.print(report.summary(), markup=False, highlight=False, soft_wrap=True)
