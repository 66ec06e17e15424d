"""Pictures of measurements. Functions return matplotlib figures, which `save_figure` writes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.evaluation.tokens import Looks, TokenResult


BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#8a8a8a"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole; the suffix decides on the format."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def codebook_usage_figure(result: TokenResult) -> Figure:
    """Codes by rank beside the uniform share, and the entropy at each position of the anchor grid."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    ranks, positions = figure.subplots(1, 2, width_ratios=(1.5, 1))
    shares = result.token_counts.sort(descending=True).values.double() / result.token_counts.sum()
    ranks.fill_between(np.arange(1, len(shares) + 1), shares.numpy(), color=BLUE, linewidth=0)
    ranks.axhline(1 / len(shares), color=ORANGE, label="all codes equally often")
    ranks.set(xlabel="code, by rank", ylabel="share of all tokens", xlim=(1, len(shares)), ylim=(0, None))
    ranks.set_title(
        f"{result.codebook.usage:.1%} of {len(shares)} codes used, perplexity {result.codebook.perplexity:.0f}"
    )
    ranks.legend(frameon=False)
    side = round(len(result.position_entropy) ** 0.5)
    picture = positions.imshow(result.position_entropy.reshape(side, side).numpy(), cmap="viridis")
    positions.set(title="entropy of the codes at each position", xticks=[], yticks=[])
    figure.colorbar(picture, label="bits")
    return figure


def anchor_figure(result: TokenResult) -> Figure:
    """How far anchors look from their cells: by layer, and over the grid for the last layer."""
    anchors = result.anchors
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    by_layer, displacement, outside = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    layers = np.arange(1, len(anchors.spread) + 1)
    for name, color in (("spread", BLUE), ("displacement", ORANGE)):
        values = getattr(anchors, name)
        by_layer.errorbar(
            layers, values.mean(1).numpy(), values.std(1).numpy(), color=color, marker="o", capsize=3, label=name
        )
    by_layer.axhline(0.5, color=GREY, linestyle="--", linewidth=1, label="edge of the own cell")
    by_layer.set(xlabel="layer", ylabel="cells of the anchor grid", xticks=layers, ylim=(0, None))
    by_layer.set_title("mean and deviation over anchors")
    by_layer.legend(frameon=False)
    side = round(anchors.spread.shape[1] ** 0.5)
    for axes, values, title, limit in (
        (displacement, anchors.displacement[-1], "displacement, last layer (cells)", None),
        (outside, anchors.outside_cell[-1], "attention outside of the own cell", 1),
    ):
        picture = axes.imshow(values.reshape(side, side).numpy(), cmap="viridis", vmin=0, vmax=limit)
        axes.set(title=title, xticks=[], yticks=[])
        figure.colorbar(picture)
    return figure


def sampling_figure(looks: Looks, anchors: Sequence[int]) -> Figure:
    """
    Where some anchors look, images down and anchors across: the orange square is the anchor's own cell, dots are its
    sampling locations, larger the more weight they have.
    """
    side = round(looks.sampling_locations.shape[1] ** 0.5)
    figure = Figure(figsize=(1.7 * len(anchors), 1.75 * len(looks.images)), layout="constrained")
    grid = figure.subplots(len(looks.images), len(anchors), squeeze=False)
    columns = (looks.images, looks.sampling_locations, looks.attention_weights, grid)
    for image, locations, weights, row in zip(*columns, strict=True):
        for anchor, axes in zip(anchors, row, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0), alpha=0.55)
            left, top = anchor % side / side, anchor // side / side
            x, y = locations[anchor].reshape(-1, 2).T.numpy()
            strength = weights[anchor].flatten()
            sizes = 90 * (strength / strength.max()).numpy()
            axes.scatter(x, y, s=sizes, color=BLUE, alpha=0.5, linewidths=0)
            axes.add_patch(
                Rectangle((left, top), 1 / side, 1 / side, fill=False, edgecolor=ORANGE, linewidth=2, zorder=3)
            )
            axes.set(xlim=(-0.15, 1.15), ylim=(1.15, -0.15), xticks=[], yticks=[])
    return figure


def guidance_figure(scales: Sequence[float], values: Sequence[dict[str, float]], features: str) -> Figure:
    """
    FID over the guidance scale, and the curve of FID against inception score, or against recall where there is no
    classifier.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over_scale, curve = figure.subplots(1, 2)
    fid = [point["fid"] for point in values]
    over_scale.plot(scales, fid, color=BLUE, marker="o")
    over_scale.set(xlabel="guidance scale (1: none)", ylabel="FID")
    name = "inception_score" if "inception_score" in values[0] else "recall"
    other = [point[name] for point in values]
    curve.plot(other, fid, color=BLUE, marker="o")
    for scale, x, y in zip(scales, other, fid, strict=True):
        curve.annotate(f"{scale:g}", (x, y), xytext=(4, 4), textcoords="offset points", color=GREY)
    curve.margins(0.12)  # room for the numbers
    curve.set(xlabel=name.replace("_", " "), ylabel="FID", title="numbers: guidance scale")
    figure.suptitle(f"features: {features}")
    return figure
