"""Pictures of many pictures."""

import math
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont


GAP = 4


def image_grid(
    images: Sequence[PIL.Image.Image], columns: int | None = None, captions: Sequence[str] | None = None
) -> PIL.Image.Image:
    """
    Images of one size, row by row on white.

    Args:
        columns (`int`, *optional*): images in a row; by default the grid is about as wide as high.
        captions (`Sequence[str]`, *optional*): one for each image, written below it and shortened to its width.

    Raises:
        ValueError: there are no images, or the captions are not as many.
    """
    if not images:
        raise ValueError("There are no images to lay out.")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"Got {len(captions)} captions for {len(images)} images.")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    font = PIL.ImageFont.load_default(size=min(max(width // 14, 10), 20))
    caption_height = 0 if captions is None else math.ceil(font.getbbox("Åg")[3]) + GAP
    rows = math.ceil(len(images) / columns)
    cell_width, cell_height = width + GAP, height + caption_height + GAP
    grid = PIL.Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    draw = PIL.ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = column * cell_width + GAP, row * cell_height + GAP
        grid.paste(image, (left, top))
        if captions is not None:
            caption = shorten(captions[index], font, width)
            indent = (width - font.getlength(caption)) / 2
            draw.text((left + indent, top + height + GAP), caption, "black", font)
    return grid


def shorten(text: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont, width: int) -> str:
    """As much of `text` as is at most `width` pixels wide, with an ellipsis where it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
