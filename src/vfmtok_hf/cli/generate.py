"""`vfmtok generate` and `vfmtok inpaint`."""

import importlib.util
import math
import re
from pathlib import Path
from typing import Annotated

import typer.core

from vfmtok_hf.cli.options import (
    MAX_SEED,
    BatchSizeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    PicturesOption,
    load_pipeline,
    one_line_errors,
    progress,
    report_written,
    requires,
    resolve_model,
    saved_classes,
)


CLASS_NAMES_FILE = Path(__file__).parent.parent / "modeling" / "class_names_vfmtok.py"
LABELS_HELP = "Classes by name or number; `vfmtok info --labels` lists them."
GuidanceOption = Annotated[
    float,
    typer.Option(
        help="Scale of classifier-free guidance; 1 is off.",
        callback=requires(lambda value: 0 <= value < math.inf, "must be 1 (none) or larger."),
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        help="Sampling temperature. *Default: the checkpoint's.*",
        callback=requires(
            lambda value: 0 < value < math.inf, "must be above 0; --top-k 1 takes the most probable token."
        ),
    ),
]
TopKOption = Annotated[
    int | None, typer.Option(min=0, help="Keep the k most probable tokens; 0 is off. *Default: the checkpoint's.*")
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        help="Keep the most probable tokens up to this sum; 1 is off. *Default: the checkpoint's.*",
        callback=requires(lambda value: 0 < value <= 1, "must be above 0 and at most 1 (off)."),
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Image i uses seed + i, for any batch size.")]


class ManyLabelsCommand(typer.core.TyperCommand):
    """A command whose `--labels` takes every word up to the next option."""

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


def check_labels(model: str | None, labels: list[str]) -> None:
    """Raise, before anything is loaded, if a label is none of the classes of a pipeline in a folder."""
    classes = saved_classes(resolve_model(model))
    if classes is None or not labels:
        return
    # By its file, since its package imports transformers, which takes seconds.
    spec = importlib.util.spec_from_file_location("class_names_vfmtok", CLASS_NAMES_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names, num_classes = classes
    module.ClassNames(names).find_all(labels, num_classes)


def generate(
    classes: Annotated[list[str] | None, typer.Argument(metavar="LABEL", help=LABELS_HELP, show_default=False)] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels", "-l", metavar="LABEL...", help="Same as the arguments. *Default: one image of each class.*"
        ),
    ] = None,
    num_images_per_label: Annotated[int, typer.Option("--num-images-per-label", "-n", min=1)] = 1,
    guidance_scale: GuidanceOption = 1.0,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels. *Default: the model's.*")] = None,
    output: PicturesOption = Path("grid.png"),
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """
    Generate images from class labels.

    `vfmtok generate smiley heart --seed 0 --output grid.png`
    """
    with one_line_errors():
        from vfmtok_hf.data.output_files import check_picture_output, fitting

        check_picture_output(output)
        chosen = [*(classes or ()), *(labels or ())]
        check_labels(model, chosen)
        pipe = load_pipeline(model, device, dtype, generates=True)

        from torch import Generator

        from vfmtok_hf.modeling.class_names_vfmtok import short_class_name
        from vfmtok_hf.plotting import picture_output

        class_ids = pipe.get_label_ids(chosen or range(pipe.transformer.config.num_classes))
        class_ids = [class_id for class_id in class_ids for _ in range(num_images_per_label)]
        num_steps = math.ceil(len(class_ids) / batch_size) * pipe.transformer.config.num_image_tokens
        columns = num_images_per_label if num_images_per_label > 1 else None
        with picture_output(output, columns) as add, progress("Generating", num_steps) as progress_callback:
            for start in range(0, len(class_ids), batch_size):
                batch = class_ids[start : start + batch_size]
                image_tokens = pipe(
                    batch,
                    guidance_scale=guidance_scale,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=[Generator().manual_seed(seed + start + index) for index in range(len(batch))],
                    callback_on_step_end=lambda *_: progress_callback(1),
                    output_type="tokens",
                ).images
                images = pipe.detokenize(image_tokens, size=size, batch_size=batch_size)
                for index, (class_id, image) in enumerate(zip(batch, images, strict=True), start):
                    name = short_class_name(pipe.id2label, class_id)
                    slug = re.sub(r"\W+", "-", name).strip("-")
                    add(image, fitting(f"{index:05d}-{slug}.png"), name)
        report_written(len(class_ids), "image", output)


def inpaint(
    image: Annotated[Path, typer.Argument(help="Image file.", show_default=False)],
    label: Annotated[str, typer.Argument(help=LABELS_HELP.replace("Classes", "Class"), show_default=False)],
    mask: Annotated[Path, typer.Option(help="Image that is white where to repaint.")],
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Number of results.")] = 1,
    guidance_scale: GuidanceOption = 1.0,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    output: PicturesOption = Path("inpainted.png"),
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """
    Repaint a part of an image. This needs a pipeline with a RAR generator, as the default one has.

    `vfmtok inpaint photo.png heart --mask mask.png`
    """
    with one_line_errors():
        from vfmtok_hf.data.output_files import check_picture_output

        check_picture_output(output)
        for file in (image, mask):
            if not file.is_file():
                raise FileNotFoundError(f"There is no image file {file}.")
        check_labels(model, [label])
        pipe = load_pipeline(model, device, dtype, generates=True, encodes=True)

        from torch import Generator

        from vfmtok_hf.plotting import picture_output

        generators = [Generator().manual_seed(seed + index) for index in range(num_images)]
        with (
            picture_output(output) as add,
            progress("Generating", pipe.transformer.config.num_image_tokens) as progress_callback,
        ):
            images = pipe.inpaint(
                [image] * num_images,
                label,
                mask,
                guidance_scale=guidance_scale,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generators,
                callback_on_step_end=lambda *_: progress_callback(1),
            ).images
            for index, picture in enumerate(images):
                add(picture, f"{index:05d}.png", f"seed {seed + index}")
        report_written(num_images, "image", output)
