"""Pictures that come in are checked; those that go out become text for a page."""

import base64
import io
from pathlib import Path

import gradio as gr
import PIL.Image
import torch

from model import PIPE


MAX_PIXELS = 40_000_000
# Readers that need no other program and are met in the wild.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def open_upload(path: str | Path) -> PIL.Image.Image:
    """
    The picture that a visitor sent; of an animation its first frame, with a word about that.

    Raises:
        gr.Error: it is no picture, is damaged, or is too large.
    """
    try:
        with PIL.Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PIL.Image.DecompressionBombError
            # The further frames of an MPO, which some phones write, are no animation.
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                gr.Warning("This picture moves: only its first frame is used.")
            picture.load()
            return picture
    except PIL.Image.DecompressionBombError:
        message = f"This picture has more than {MAX_PIXELS // 1_000_000} million pixels: scale it down first."
    except Exception:  # PIL's readers report damage as nearly anything
        message = f"This file cannot be read as a picture. {', '.join(FORMATS)} files work."
    raise gr.Error(message, print_exception=False)


def picture_upload(**settings) -> gr.Image:
    """
    A `gr.Image` whose value is a checked PIL image.

    The component's own reader fails on damaged files before anything of ours is called. It is replaced on the instance,
    because gradio writes a stub file beside each module that derives a component.
    """

    def read(payload) -> PIL.Image.Image | None:
        return None if payload is None or payload.path is None else open_upload(payload.path)

    upload = gr.Image(label="Picture", show_label=False, sources=["upload", "clipboard"], buttons=[], **settings)
    upload.preprocess = read
    return upload


def pixel_values_of(picture: PIL.Image.Image | None) -> torch.Tensor:
    """
    The picture as the model takes it, `(1, 3, image_size, image_size)` in [-1, 1].

    Raises:
        gr.Error: there is no picture, or next to nothing of it would be left.
    """
    if picture is None:
        raise gr.Error("There is no picture: upload one or choose an example.", print_exception=False)
    try:
        return PIPE.image_processor(picture, return_tensors="pt")["pixel_values"].to(PIPE.vq_model.device)
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def data_url(picture: PIL.Image.Image) -> str:
    """The picture inside a URL, as PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
