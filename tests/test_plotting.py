"""Grids of images, and what a figure shows, where a file that is not empty proves nothing."""

import os
import subprocess
import sys

import PIL.Image
import pytest
import torch

from vfmtok_hf.plotting import (
    GAP,
    image_grid,
    picture_output,
    plot_guidance,
    plot_image_tokens,
    plot_sampling_locations,
    plot_training_curves,
)


def picture(color, side=8):
    return PIL.Image.new("RGB", (side, side), color)


def test_grid_lays_out_row_by_row():
    colors = ["red", "blue", "green", "black", "yellow"]
    grid = image_grid([picture(color) for color in colors])
    assert grid.size == (3 * 8 + 4 * GAP, 2 * 8 + 3 * GAP)
    for index, color in enumerate(colors):
        row, column = divmod(index, 3)
        center = (GAP + 4 + column * (8 + GAP), GAP + 4 + row * (8 + GAP))
        assert grid.getpixel(center) == picture(color).getpixel((0, 0))


def test_captions_stay_in_their_cells():
    images = [picture("white", 40)] * 2
    plain = image_grid(images, columns=2)
    captioned = image_grid(images, columns=2, captions=["a caption that is far too long", ""])
    assert captioned.height > plain.height
    ink = PIL.Image.eval(captioned.convert("L"), lambda level: 255 - level).getbbox()
    assert GAP <= ink[0] <= ink[2] <= GAP + 40
    assert ink[1] > GAP + 40


def test_grids_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no images"):
        image_grid([])
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        image_grid([picture("red")] * 2, captions=["one"])


def test_pictures_go_to_a_grid_or_to_single_files(tmp_path):
    for output in (tmp_path / "grid.png", tmp_path / "folder"):
        with picture_output(output, columns=2) as add:
            for index, color in enumerate(("red", "blue", "green")):
                add(picture(color), f"{index}.png", "")
    assert PIL.Image.open(tmp_path / "grid.png").size == (2 * 8 + 3 * GAP, 2 * 8 + 3 * GAP)
    assert sorted(os.listdir(tmp_path / "folder")) == ["0.png", "1.png", "2.png"]
    assert PIL.Image.open(tmp_path / "folder" / "1.png").getpixel((0, 0)) == (0, 0, 255)


def test_the_guidance_curve_has_every_scale_beside_its_point():
    values = [
        {"fid": 9.0, "inception_score": 1.0},
        {"fid": 4.0, "inception_score": 3.0},
        {"fid": 6.0, "inception_score": 5.0},
    ]
    figure = plot_guidance([1.0, 1.5, 3.0], values, "inception")
    over_scale, curve = figure.axes
    assert over_scale.lines[0].get_xydata().tolist() == [[1, 9], [1.5, 4], [3, 6]]
    assert curve.lines[0].get_xydata().tolist() == [[1, 9], [3, 4], [5, 6]]
    assert [text.get_text() for text in curve.texts] == ["1", "1.5", "3"]
    figure.draw_without_rendering()
    frame = curve.get_window_extent()
    for text in curve.texts:
        box = text.get_window_extent()
        assert frame.x0 < box.x0
        assert box.x1 < frame.x1
        assert frame.y0 < box.y0
        assert box.y1 < frame.y1


def test_without_a_classifier_the_curve_is_over_recall():
    figure = plot_guidance([1.0, 2.0], [{"fid": 2.0, "recall": 0.5}, {"fid": 1.0, "recall": 0.25}], "dinov2")
    assert figure.axes[1].get_xlabel() == "recall"
    assert figure.axes[1].lines[0].get_xdata().tolist() == [0.5, 0.25]


def test_training_curves_are_told_apart_by_run_and_kind():
    one = {"loss": {"train": {2: 3.0, 1: 4.0}, "validation": {2: 7.0}}}
    other = {"loss": {"train": {1: 8.0}}, "lr": {"train": {1: 0.1}}}
    figure = plot_training_curves([("run", one), ("run", other)])
    loss, rate = figure.axes
    assert [panel.get_title() for panel in (loss, rate)] == ["loss", "lr"]
    curves = [line for line in loss.lines if len(line.get_xdata())]
    assert [line.get_xydata().tolist() for line in curves] == [[[1, 4], [2, 3]], [[2, 7]], [[1, 8]]]
    assert [line.get_linestyle() for line in curves] == ["-", "--", "-"]
    assert [line.get_color() for line in curves] == ["C0", "C0", "C1"]
    assert rate.lines[0].get_color() == "C1"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run", "run", "validation"]


def test_without_matplotlib_grids_work_and_figures_say_what_to_install():
    program = """
import sys
sys.modules["matplotlib"] = None
import PIL.Image
from vfmtok_hf.plotting import image_grid, plot_guidance
image_grid([PIL.Image.new("RGB", (8, 8))])
try:
    plot_guidance([1.0], [{"fid": 1.0, "recall": 1.0}], "inception")
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 'pip install "vfmtok-hf[plot]"' in result.stdout


def test_tokens_are_written_into_their_cells():
    tokens = torch.tensor([5, 900, 7, 5])
    cells, numbers = plot_image_tokens(picture("red"), tokens).axes
    assert [(text.get_text(), text.get_position()) for text in numbers.texts] == [
        ("5", (0.5, 0.5)), ("900", (1.5, 0.5)), ("7", (0.5, 1.5)), ("5", (1.5, 1.5)),
    ]  # fmt: skip
    colors = numbers.images[0].get_array()
    assert colors[0, 0] == colors[1, 1] != colors[0, 1]
    assert cells.images[0].get_extent() == numbers.images[0].get_extent()


def test_sampling_locations_are_plotted_by_level_and_weight():
    locations = torch.rand(1, 4, 3, 2, 5, 2, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1, 4, 3, 2, 5)
    weights[0, 3, :, 0] = 0.1
    weights[0, 3, :, 1] = 0.2
    # As the model returns them outside of `torch.no_grad`.
    gradients = locations.clone().requires_grad_(), weights.clone().requires_grad_()
    (axes,) = plot_sampling_locations([picture("red")], *gradients, anchors=[3]).axes
    fine, coarse = axes.collections
    assert torch.equal(torch.tensor(fine.get_offsets().data), locations[0, 3, :, 0].reshape(-1, 2))
    assert fine.get_sizes() * 2 == pytest.approx(coarse.get_sizes())
    assert fine.get_facecolor()[0].tolist() != coarse.get_facecolor()[0].tolist()
    cell = axes.patches[0]
    assert (cell.get_xy(), cell.get_width()) == ((0.5, 0.5), 0.5)
