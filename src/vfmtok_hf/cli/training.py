"""`vfmtok train`, `vfmtok extract-tokens` and `vfmtok plot`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from vfmtok_hf.cli.options import (
    MAX_SEED,
    BatchSizeOption,
    DeviceOption,
    ModelOption,
    one_line_errors,
    output_option,
    progress,
    quiet_libraries,
    report_skipped,
    report_written,
    resolve_model,
)


train_app = typer.Typer(help="Train image tokenizers and generators.", no_args_is_help=True)
# The trainers have their own parser, which also handles --help.
OWN_PARSER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

# The executors that use an option.
DATATROVE = ("local", "slurm", "ray")
USED_BY = {
    "tasks": DATATROVE,
    "workers": DATATROVE,
    "gpus_per_task": ("slurm", "ray"),
    "partition": ("slurm",),
    "qos": ("slurm",),
    "time": ("slurm",),
}


def extract_tokens(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, or a data set: parquet, arrow, `.tar`, or a repository.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        output_option("Folder of the token set. An interrupted extraction is continued."),
    ],
    crops: Annotated[Literal["random", "ten", "center"], typer.Option(help="Views of each image.")] = "random",
    num_crops: Annotated[int, typer.Option(min=1, help="Random crops per image.")] = 4,
    crop_scale: Annotated[
        tuple[float, float], typer.Option(help="Range of their side, relative to the image's shorter side.")
    ] = (0.8, 1.0),
    horizontal_flip: Annotated[
        bool, typer.Option(help="Mirror half of them, or with center crops add the mirror image.")
    ] = True,
    codebook_top_k: Annotated[
        int,
        typer.Option(min=1, help="Token sequences per view; 2 adds the second-nearest codebook rows (VFMTok-RAR)."),
    ] = 1,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    shard_size: Annotated[int, typer.Option(min=1, help="Images per file.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    model: ModelOption = None,
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 32,
    num_workers: Annotated[
        int, typer.Option(min=0, help="Processes that read images; on Slurm and Ray a task gets one CPU more.")
    ] = 0,
    executor: Annotated[
        Literal["accelerate", "local", "slurm", "ray"],
        typer.Option(help="This process (or those of `accelerate launch`), or tasks of datatrove."),
    ] = "accelerate",
    tasks: Annotated[int, typer.Option(min=1, help="With datatrove: number of tasks that share the files.")] = 1,
    workers: Annotated[int, typer.Option(help="With datatrove: number of tasks at a time; -1 is all.")] = -1,
    partition: Annotated[str | None, typer.Option(help="With `slurm`: partition of the jobs.")] = None,
    qos: Annotated[str | None, typer.Option(help="With `slurm`: quality of service of the jobs.")] = None,
    gpus_per_task: Annotated[
        int | None, typer.Option(min=0, help="With `slurm` and `ray`. *Default: 1, or 0 with `--device cpu`.*")
    ] = None,
    time: Annotated[str, typer.Option(help="With `slurm`: time limit of a task.")] = "8:00:00",
) -> None:
    """
    Encode labeled images to a token set for training generators.

    Several processes: `torchrun --nproc_per_node N -m vfmtok_hf.training.extract_tokens`, or `--executor local --tasks N`.
    """
    with one_line_errors("train" if executor == "accelerate" else "datatrove"):
        from vfmtok_hf.data.files import check_source
        from vfmtok_hf.data.output_files import check_output_folder

        for name, executors in USED_BY.items():
            if executor not in executors and context.get_parameter_source(name).name != "DEFAULT":
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --executor {executor}.")
        if executor == "slurm" and partition is None:
            raise ValueError("Slurm needs a --partition.")
        check_output_folder(output)
        check_source(data)
        name_or_path = resolve_model(model)
        if executor != "accelerate":
            from vfmtok_hf.training.arguments import ExtractionArguments
            from vfmtok_hf.training.bulk_extraction import extract_with_datatrove

            arguments = ExtractionArguments(
                data=data,
                tokenizer=name_or_path,
                output=str(output),
                crops=crops,
                num_crops=num_crops,
                crop_scale=list(crop_scale),
                horizontal_flip=horizontal_flip,
                codebook_top_k=codebook_top_k,
                split=split,
                shard_size=shard_size,
                seed=seed,
                batch_size=batch_size,
                num_workers=num_workers,
            )
            if gpus_per_task is None:
                gpus_per_task = int(device != "cpu")
            options = {
                "local": {},
                "ray": {"gpus_per_task": gpus_per_task},
                "slurm": {"gpus_per_task": gpus_per_task, "partition": partition, "qos": qos, "time": time},
            }[executor]
            extract_with_datatrove(arguments, executor, tasks, workers, device, **options)
            return
        quiet_libraries()

        from vfmtok_hf.cli.environment import default_device
        from vfmtok_hf.data.sources import open_records
        from vfmtok_hf.data.transforms import ImageViews
        from vfmtok_hf.training import token_extraction
        from vfmtok_hf.training.finetuning import load_tokenizer

        records = open_records(data, split)
        tokenizer = load_tokenizer(name_or_path).to(device or default_device())
        views = ImageViews(
            tokenizer.config.image_size,
            crops,
            num_crops,
            crop_scale,
            horizontal_flip=horizontal_flip,
            seed=seed,
        )
        with progress("Tokenizing", len(records)) as progress_callback:
            index = token_extraction.extract_tokens(
                tokenizer,
                records,
                output,
                views,
                codebook_top_k,
                shard_size,
                batch_size,
                num_workers,
                progress_callback=progress_callback,
            )
        for name in index["unreadable"]:
            report_skipped(name)
        report_written(index["num_images"], "tokenized image", output)


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Image file. *Default: `curves.png` in the first run.*")
    ] = None,
) -> None:
    """Plot losses and metrics over the steps of one or several training runs."""
    with one_line_errors("plot"):
        from vfmtok_hf.data.output_files import check_output_file
        from vfmtok_hf.plotting import plot_training_curves, save_figure
        from vfmtok_hf.training.logs import read_curves

        picture = output or runs[0] / "curves.png"
        check_output_file(picture)
        figure = plot_training_curves([(run.resolve().name, read_curves(run)) for run in runs])
        save_figure(figure, picture)
        report_written(1, "figure", picture)


@train_app.command(context_settings=OWN_PARSER)
def tokenizer(context: typer.Context) -> None:
    """Train the image tokenizer on images. `--help` lists its arguments."""
    from vfmtok_hf.training import scripts, train_tokenizer

    scripts.run_script(partial(train_tokenizer.main, context.args))


@train_app.command(context_settings=OWN_PARSER)
def generator(context: typer.Context) -> None:
    """Train a class-conditional generator of image tokens. `--help` lists its arguments."""
    from vfmtok_hf.training import scripts, train_generator

    scripts.run_script(partial(train_generator.main, context.args))
