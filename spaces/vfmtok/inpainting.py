"""Repaint a part of an image for a class."""

import gradio as gr
import PIL.Image
import torch

from model import NUM_TOKENS, PIPE
from pictures import data_url, pixel_values_of
from settings import Settings
from views import download_name, image_captions


def inpaint(picture: PIL.Image.Image | None, cells: list[int], settings: Settings) -> dict:
    """
    Regenerate the tokens of `cells`, numbered in raster order, and decode the image. JSON-serializable.

    Raises:
        gr.Error: there is no image, or `cells` are not numbers of cells.
    """
    pixel_values_of(picture)  # checks it
    is_list = isinstance(cells, list) and all(type(cell) is int for cell in cells)
    if not is_list or not cells or not 0 <= min(cells) <= max(cells) < NUM_TOKENS:
        raise gr.Error("Mark at least one cell of the image.", print_exception=False)
    mask = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    mask[cells] = True
    generator = torch.Generator().manual_seed(settings.seed)
    [image] = PIPE.inpaint(picture, settings.label, mask, generator=generator).images
    [caption] = image_captions(settings)
    return {"url": data_url(image), "caption": caption, "file": download_name(caption)}
