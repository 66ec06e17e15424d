"""What a figure shows, where a file that is not empty proves nothing."""

from matplotlib.backends.backend_agg import FigureCanvasAgg

from vfmtok_hf.evaluation.plots import guidance_figure


def test_the_guidance_curve_has_every_scale_beside_its_point():
    values = [
        {"fid": 9.0, "inception_score": 1.0},
        {"fid": 4.0, "inception_score": 3.0},
        {"fid": 6.0, "inception_score": 5.0},
    ]
    figure = guidance_figure([1.0, 1.5, 3.0], values, "inception")
    over_scale, curve = figure.axes
    assert over_scale.lines[0].get_xydata().tolist() == [[1, 9], [1.5, 4], [3, 6]]
    assert curve.lines[0].get_xydata().tolist() == [[1, 9], [3, 4], [5, 6]]
    assert [text.get_text() for text in curve.texts] == ["1", "1.5", "3"]
    FigureCanvasAgg(figure).draw()
    frame = curve.get_window_extent()
    for text in curve.texts:
        box = text.get_window_extent()
        assert frame.x0 < box.x0
        assert box.x1 < frame.x1
        assert frame.y0 < box.y0
        assert box.y1 < frame.y1


def test_without_a_classifier_the_curve_is_over_recall():
    figure = guidance_figure([1.0, 2.0], [{"fid": 2.0, "recall": 0.5}, {"fid": 1.0, "recall": 0.25}], "dinov2")
    assert figure.axes[1].get_xlabel() == "recall"
    assert figure.axes[1].lines[0].get_xdata().tolist() == [0.5, 0.25]
