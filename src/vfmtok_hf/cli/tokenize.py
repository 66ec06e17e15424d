"""`vfmtok tokenize`, `detokenize` and `reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vfmtok_hf.cli.options import (
    BatchSizeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImagesArgument,
    ModelOption,
    PicturesOption,
    load_pipeline,
    one_line_errors,
    output_console,
    progress,
    quiet_libraries,
    report_skipped,
    report_written,
    resolve_model,
)


def tokenize(
    images: ImagesArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="`.safetensors`, `.parquet` (a data set), or `.npy` with the names in a file next to it.",
        ),
    ] = Path("tokens.safetensors"),
    skip_errors: Annotated[bool, typer.Option(help="Report and skip images that cannot be used.")] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """Encode images to image tokens. Folders are read batch by batch."""
    with one_line_errors():
        from vfmtok_hf.data.files import find_images
        from vfmtok_hf.data.output_files import check_output_file, check_token_suffix

        check_token_suffix(output)
        check_output_file(output)
        files = find_images(images)
        pipe = load_pipeline(model, device, dtype, encodes=True)

        import torch

        from vfmtok_hf.data.token_files import save_tokens, tokenize_files

        names, parts = [], []
        with progress("Tokenizing", len(files)) as progress_callback:
            on_error = report_skipped if skip_errors else None
            for batch_names, image_tokens in tokenize_files(pipe, files, batch_size, on_error):
                names += batch_names
                parts.append(image_tokens.cpu())
                progress_callback(batch_size)
        if not names:
            raise ValueError("None of the images can be used.")
        save_tokens(output, names, torch.cat(parts), files, pipe.vq_model)
        report_written(len(names), "tokenized image", output)


def detokenize(
    tokens: Annotated[
        Path, typer.Argument(help="File of image tokens, such as from `vfmtok tokenize`.", show_default=False)
    ],
    output: PicturesOption = Path("images"),
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels. *Default: the model's.*")] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """Decode image tokens to images."""
    with one_line_errors():
        from vfmtok_hf.data.output_files import check_picture_output, check_token_suffix, picture_names

        check_picture_output(output)
        check_token_suffix(tokens)
        if not tokens.is_file():
            raise FileNotFoundError(f"There is no token file {tokens}.")
        resolve_model(model)
        quiet_libraries()

        from vfmtok_hf.data.token_files import load_tokens
        from vfmtok_hf.plotting import picture_output

        names, image_tokens = load_tokens(tokens)
        file_names = picture_names(names)
        pipe = load_pipeline(model, device, dtype)
        with picture_output(output) as add, progress("Decoding", len(names)) as progress_callback:
            for start in range(0, len(names), batch_size):
                images = pipe.detokenize(image_tokens[start : start + batch_size], size=size)
                for index, image in enumerate(images, start):
                    add(image, file_names[index], names[index])
                progress_callback(len(images))
        report_written(len(names), "image", output)


def reconstruct(
    images: ImagesArgument,
    output: PicturesOption = Path("reconstructions.png"),
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """
    Encode images to image tokens, or to the latents of a continuous autoencoder, and decode them. Shows originals next to
    reconstructions, with their PSNR.
    """
    with one_line_errors():
        from vfmtok_hf.data.files import find_images
        from vfmtok_hf.data.output_files import check_picture_output, picture_names

        check_picture_output(output)
        files = find_images(images)
        file_names = dict(zip(files, picture_names(list(files)), strict=True))
        pipe = load_pipeline(model, device, dtype, encodes=True, reconstructs=True)

        from torchvision.transforms.functional import to_pil_image

        from vfmtok_hf.evaluation.reconstruction import psnr
        from vfmtok_hf.pipelines.pipeline_base_vfmtok import batches
        from vfmtok_hf.plotting import image_grid, picture_output

        decibels = {}
        with picture_output(output) as add, progress("Reconstructing", len(files)) as progress_callback:
            for names in batches(list(files), batch_size):
                paths = [files[name] for name in names]
                crops = pipe.image_processor(
                    paths,
                    size=pipe.autoencoder.config.image_size,
                    do_rescale=False,
                    do_normalize=False,
                    return_tensors="pt",
                )["pixel_values"]
                reconstructions = pipe.reconstruct(paths, "uint8", batch_size=batch_size).images.cpu()
                for name, value, crop, reconstruction in zip(
                    names, psnr(crops, reconstructions).tolist(), crops, reconstructions, strict=True
                ):
                    decibels[name] = value
                    pair = [to_pil_image(crop), to_pil_image(reconstruction)]
                    add(image_grid(pair, 2, [name, f"{value:.1f} dB"]), file_names[name], "")
                progress_callback(len(names))
        print_psnr(decibels)
        report_written(len(decibels), "pair", output)


def print_psnr(decibels: dict[str, float]) -> None:
    table = Table("image", "PSNR (dB)", show_footer=len(decibels) > 1)
    table.columns[0].footer, table.columns[1].footer = "mean", f"{sum(decibels.values()) / len(decibels):.2f}"
    table.columns[1].justify = "right"
    for name, value in decibels.items():
        table.add_row(escape(name), f"{value:.2f}")
    output_console.print(table)
