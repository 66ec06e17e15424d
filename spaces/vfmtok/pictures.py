"""Check uploaded images, and encode images as text for the page."""

import base64
import io
from pathlib import Path

import gradio as gr
import PIL.Image
import torch

from model import PIPE


MAX_PIXELS = 40_000_000
# Common formats whose readers need no other program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def open_upload(path: str | Path) -> PIL.Image.Image:
    """
    Open an uploaded image. An animation gives its first frame, with a warning.

    Raises:
        gr.Error: the file is not an image, is damaged, or is too large.
    """
    try:
        with PIL.Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PIL.Image.DecompressionBombError
            # The extra frames of an MPO, which some phones write, are not an animation.
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                gr.Warning("This image is animated: only its first frame is used.")
            picture.load()
            return picture
    except PIL.Image.DecompressionBombError:
        message = f"This image has more than {MAX_PIXELS // 1_000_000} million pixels. Scale it down first."
    except Exception:  # PIL's readers raise nearly anything for damaged files
        message = f"This file cannot be read as an image. Supported formats: {', '.join(FORMATS)}."
    raise gr.Error(message, print_exception=False)


def picture_upload(**settings) -> gr.Image:
    """
    A `gr.Image` whose value is a checked PIL image.

    The component's own reader fails on damaged files before our code is called. It is replaced on the instance, because
    gradio writes a stub file next to each module that subclasses a component.
    """

    def read(payload) -> PIL.Image.Image | None:
        return None if payload is None or payload.path is None else open_upload(payload.path)

    upload = gr.Image(label="Image", show_label=False, sources=["upload", "clipboard"], buttons=[], **settings)
    upload.preprocess = read
    return upload


def pixel_values_of(picture: PIL.Image.Image | None) -> torch.Tensor:
    """
    The model's input for an image, `(1, 3, image_size, image_size)` in [-1, 1].

    Raises:
        gr.Error: there is no image, or cropping would leave almost nothing of it.
    """
    if picture is None:
        raise gr.Error("There is no image. Upload one or choose an example.", print_exception=False)
    try:
        return PIPE.image_processor(picture, return_tensors="pt")["pixel_values"].to(PIPE.vq_model.device)
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def data_url(picture: PIL.Image.Image) -> str:
    """Encode an image as a PNG `data:` URL."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
