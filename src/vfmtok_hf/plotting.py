"""
Images arranged in a grid, and figures of measurements, tokens and training runs.

Figures are matplotlib's, which is imported when the first one is plotted; `save_figure` writes them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vfmtok_hf.data.output_files import is_picture, save_picture, whole_file


if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vfmtok_hf.evaluation.tokens import TokenResult


GAP = 4
BLUE, ORANGE, GRAY = "#2f6fb0", "#d9822b", "#8a8a8a"
CURVE_COLUMNS = 3
# Colors of the feature levels, from fine to coarse.
LEVEL_COLORS = ("#2f6bff", "#d6249f", "#00997a", "#7a3cff")


# ---------------------------------------------------------------------------------------------------------------
# Grids of images


def image_grid(
    images: Sequence[PIL.Image.Image], columns: int | None = None, captions: Sequence[str] | None = None
) -> PIL.Image.Image:
    """
    Arrange images of one size in a grid, row by row on white.

    Args:
        columns (`int`, *optional*): images in a row; by default the grid is about as wide as high.
        captions (`Sequence[str]`, *optional*): one per image, written below it and shortened to its width.

    Raises:
        ValueError: there are no images, or the number of captions differs.
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
    """Shorten `text` to at most `width` pixels, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@contextmanager
def picture_output(path: Path, columns: int | None = None) -> Iterator[Callable[[PIL.Image.Image, str, str], None]]:
    """
    Write images as one grid if `path` is an image file, otherwise as single files in the folder `path`.

    Yields `add(picture, file_name, caption)`. Single files are written immediately and without captions. The grid, with
    `columns` images per row, is written when the block ends. Captions may be empty.
    """
    pictures: list[PIL.Image.Image] = []
    captions: list[str] = []

    def add(picture: PIL.Image.Image, file_name: str, caption: str) -> None:
        if is_picture(path):
            pictures.append(picture)
            captions.append(caption)
        else:
            save_picture(picture, path / file_name)

    yield add
    if pictures:
        save_picture(image_grid(pictures, columns, captions if any(captions) else None), path)


# ---------------------------------------------------------------------------------------------------------------
# Figures


def new_figure(width: float, height: float) -> "Figure":
    """
    Create an empty figure; width and height are in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plotting needs matplotlib: pip install "vfmtok-hf[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure atomically. The suffix selects the format."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_codebook_usage(result: "TokenResult") -> "Figure":
    """Plot the share of each code by rank, and the entropy at each position of the anchor grid."""
    figure = new_figure(9, 3.6)
    ranks, positions = figure.subplots(1, 2, width_ratios=(1.5, 1))
    shares = result.token_counts.sort(descending=True).values.double() / result.token_counts.sum()
    ranks.fill_between(range(1, len(shares) + 1), shares.numpy(), color=BLUE, linewidth=0)
    ranks.axhline(1 / len(shares), color=ORANGE, label="uniform")
    ranks.set(xlabel="code, by rank", ylabel="share of all tokens", xlim=(1, len(shares)), ylim=(0, None))
    ranks.set_title(
        f"{result.codebook.usage:.1%} of {len(shares)} codes used, perplexity {result.codebook.perplexity:.0f}"
    )
    ranks.legend(frameon=False)
    plot_anchor_grid(positions, result.position_entropy, "entropy of the codes at each position", unit="bits")
    return figure


def plot_anchor_statistics(result: "TokenResult") -> "Figure":
    """Plot the distance of sampling locations from their anchors' cells: by layer, and over the grid for the last layer."""
    anchors = result.anchors
    figure = new_figure(11, 3.6)
    by_layer, displacement, outside = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    layers = range(1, len(anchors.spread) + 1)
    for name, color in (("spread", BLUE), ("displacement", ORANGE)):
        values = getattr(anchors, name)
        by_layer.errorbar(
            layers, values.mean(1).numpy(), values.std(1).numpy(), color=color, marker="o", capsize=3, label=name
        )
    by_layer.axhline(0.5, color=GRAY, linestyle="--", linewidth=1, label="edge of the anchor's cell")
    by_layer.set(xlabel="layer", ylabel="cells of the anchor grid", xticks=layers, ylim=(0, None))
    by_layer.set_title("mean and deviation over anchors")
    by_layer.legend(frameon=False)
    plot_anchor_grid(displacement, anchors.displacement[-1], "displacement, last layer (cells)", minimum=0)
    plot_anchor_grid(outside, anchors.outside_cell[-1], "attention outside of the anchor's cell", minimum=0, maximum=1)
    return figure


def plot_anchor_grid(
    axes: "Axes",
    values: "torch.Tensor",
    title: str,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: str = "",
) -> None:
    """Plot one value per anchor `(num_anchors,)` as colors of the anchor grid, with a color bar."""
    side = math.isqrt(len(values))
    image = axes.imshow(values.reshape(side, side).numpy(), cmap="viridis", vmin=minimum, vmax=maximum)
    axes.set(title=title, xticks=[], yticks=[])
    axes.figure.colorbar(image, label=unit)


def plot_image_tokens(image: PIL.Image.Image, image_tokens: "torch.Tensor") -> "Figure":
    """
    Draw the cells of the anchor grid over an image, and next to it the image tokens of these cells.

    Args:
        image (`PIL.Image.Image`): the image as the model sees it, cropped to a square.
        image_tokens (`torch.Tensor` of shape `(num_anchors,)`): its tokens. Equal tokens have equal colors.
    """
    side = math.isqrt(len(image_tokens))
    grid = image_tokens.reshape(side, side).tolist()
    figure = new_figure(10, 5)
    cells, numbers = figure.subplots(1, 2)
    cells.imshow(image, extent=(0, side, side, 0))
    # Neighboring tokens are unrelated: the golden angle gives them unrelated hues.
    numbers.imshow(
        [[(token * 137.508 % 360) / 360 for token in row] for row in grid],
        extent=(0, side, side, 0), cmap="hsv", vmin=0, vmax=1, alpha=0.25,
    )  # fmt: skip
    for row, line in enumerate(grid):
        for column, token in enumerate(line):
            numbers.text(column + 0.5, row + 0.5, str(token), ha="center", va="center", fontsize=84 / side)
    for axes, title in ((cells, "image"), (numbers, "image tokens")):
        axes.set(title=title, xticks=range(side + 1), yticks=range(side + 1), xticklabels=[], yticklabels=[])
        axes.grid(color=GRAY, linewidth=0.5)
        axes.tick_params(length=0)
    return figure


def plot_sampling_locations(
    images: Sequence[PIL.Image.Image],
    sampling_locations: "torch.Tensor",
    attention_weights: "torch.Tensor",
    anchors: Sequence[int],
) -> "Figure":
    """
    Draw where anchors look, one row per image and one column per anchor.

    The black square is the anchor's own cell. Dots are its sampling locations: their area is the attention weight, their
    color the feature level, from fine to coarse.

    Args:
        images (`Sequence[PIL.Image.Image]`): the images as the model sees them.
        sampling_locations (`torch.Tensor` of shape `(images, num_anchors, heads, levels, points, 2)`): (x, y) in [0, 1]^2,
            one layer of what `VFMTokModel.encode` returns with `output_sampling_locations=True`.
        attention_weights (`torch.Tensor` of shape `(images, num_anchors, heads, levels, points)`): of the same layer.
        anchors (`Sequence[int]`): which anchors.
    """
    figure = new_figure(1.7 * len(anchors), 1.75 * len(images))
    from matplotlib.patches import Rectangle

    side = math.isqrt(sampling_locations.shape[1])
    grid = figure.subplots(len(images), len(anchors), squeeze=False)
    values = (tensor.detach().float().cpu() for tensor in (sampling_locations, attention_weights))
    for image, locations, weights, row in zip(images, *values, grid, strict=True):
        for anchor, axes in zip(anchors, row, strict=True):
            axes.imshow(image, extent=(0, 1, 1, 0), alpha=0.55)
            left, top = anchor % side / side, anchor // side / side
            for level, color in zip(range(locations.shape[2]), cycle(LEVEL_COLORS), strict=False):
                x, y = locations[anchor, :, level].reshape(-1, 2).T.numpy()
                strength = (weights[anchor, :, level] / weights[anchor].max()).flatten().numpy()
                axes.scatter(x, y, s=90 * strength, color=color, alpha=0.6, linewidths=0)
            axes.add_patch(
                Rectangle((left, top), 1 / side, 1 / side, fill=False, edgecolor="black", linewidth=2, zorder=3)
            )
            axes.set(xlim=(-0.15, 1.15), ylim=(1.15, -0.15), xticks=[], yticks=[])
    return figure


def plot_guidance(scales: Sequence[float], values: Sequence[dict[str, float]], features: str) -> "Figure":
    """
    Plot FID over the guidance scale, and FID against the inception score, or against recall if the network is not a
    classifier.
    """
    figure = new_figure(9, 3.6)
    over_scale, curve = figure.subplots(1, 2)
    fid = [point["fid"] for point in values]
    over_scale.plot(scales, fid, color=BLUE, marker="o")
    over_scale.set(xlabel="guidance scale (1: off)", ylabel="FID")
    name = "inception_score" if "inception_score" in values[0] else "recall"
    other = [point[name] for point in values]
    curve.plot(other, fid, color=BLUE, marker="o")
    for scale, x, y in zip(scales, other, fid, strict=True):
        curve.annotate(f"{scale:g}", (x, y), xytext=(4, 4), textcoords="offset points", color=GRAY)
    curve.margins(0.12)  # room for the numbers
    curve.set(xlabel=name.replace("_", " "), ylabel="FID", title="numbers: guidance scale")
    figure.suptitle(f"features: {features}")
    return figure


# Name of a quantity -> kind of log line ("train" or "validation") -> step -> value.
Curves = Mapping[str, Mapping[str, Mapping[int, float]]]


def plot_training_curves(runs: Sequence[tuple[str, Curves]]) -> "Figure":
    """Plot training curves, one panel per quantity and one color per named run; validation is dashed."""
    names = sorted({name for _, curves in runs for name in curves})
    rows = math.ceil(len(names) / CURVE_COLUMNS)
    figure = new_figure(5 * CURVE_COLUMNS, 3 * rows + 0.5)
    for panel, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, CURVE_COLUMNS, panel, title=name, xlabel="step")
        for number, (_, curves) in enumerate(runs):
            for kind, values in curves.get(name, {}).items():
                style = "-" if kind == "train" else "--"
                marker = "o" if kind != "train" or len(values) == 1 else None
                steps = sorted(values)
                heights = [values[step] for step in steps]
                axes.plot(steps, heights, style, marker=marker, markersize=3, linewidth=1, color=f"C{number % 10}")
        axes.grid(alpha=0.3)
    for number, (run, _) in enumerate(runs):
        figure.axes[0].plot([], [], color=f"C{number % 10}", label=run)
    figure.axes[0].plot([], [], "--o", color=GRAY, markersize=3, linewidth=1, label="validation")
    figure.legend(loc="outside upper center", ncols=len(runs) + 1)
    return figure
