"""`vfmtok generate`."""

import math
import re
from pathlib import Path
from typing import Annotated

import typer.core

from vfmtok_hf.cli.options import (
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
)


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
    seed: Annotated[int, typer.Option(min=0, help="Image i is generated from seed + i, whatever the batch size.")] = 0,
    output: PicturesOption = Path("grid.png"),
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """
    Generate images of classes.

    `vfmtok generate --labels smiley heart --seed 0 --output grid.png`
    """
    with one_line_errors():
        from torch import Generator

        from vfmtok_hf.data.output_files import check_picture_output, fitting
        from vfmtok_hf.modeling.class_names_vfmtok import short_class_name
        from vfmtok_hf.plotting import picture_output

        check_picture_output(output)
        pipe = load_pipeline(model, device, dtype, generates=True)
        class_ids = pipe.get_label_ids(labels or range(pipe.transformer.config.num_classes))
        class_ids = [class_id for class_id in class_ids for _ in range(num_images_per_label)]
        num_steps = math.ceil(len(class_ids) / batch_size) * pipe.transformer.config.num_image_tokens
        columns = num_images_per_label if num_images_per_label > 1 else None
        with picture_output(output, columns) as add, progress("Generating", num_steps) as progress_callback:
            for start in range(0, len(class_ids), batch_size):
                batch = class_ids[start : start + batch_size]
                images = pipe(
                    batch,
                    guidance_scale=guidance_scale,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=[Generator().manual_seed(seed + start + index) for index in range(len(batch))],
                    callback_on_step_end=lambda *_: progress_callback(1),
                ).images
                for index, (class_id, image) in enumerate(zip(batch, images, strict=True), start):
                    name = short_class_name(pipe.id2label, class_id)
                    slug = re.sub(r"\W+", "-", name).strip("-")
                    add(image, fitting(f"{index:05d}-{slug}.png"), name)
        report_written(len(class_ids), "image", output)
