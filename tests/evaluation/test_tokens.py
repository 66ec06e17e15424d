"""Token statistics, on counts and locations whose answer is known."""

import pytest
import torch

from tests.evaluation.folders import write_images
from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf.data.statistics import entropy_bits
from vfmtok_hf.evaluation.tokens import AnchorTracker, evaluate_tokens, token_count_remarks


SIDE = 3
CENTERS = (torch.arange(SIDE) + 0.5) / SIDE
REFERENCE_POINTS = torch.cartesian_prod(CENTERS, CENTERS).flip(-1)


def tracked(offsets: torch.Tensor):
    """Statistics of one layer whose locations lie `offsets`, in cells, from the reference points: `(images, anchors, 1, 1, n, 2)`."""
    tracker = AnchorTracker(REFERENCE_POINTS)
    locations = REFERENCE_POINTS[:, None, None, None] + offsets / SIDE
    weights = torch.full(locations.shape[:-1], 1 / locations.shape[-2])
    tracker.update([locations], [weights])
    return tracker.statistics()


def test_usage_of_few_tokens_is_remarked_on():
    """40 tokens for 4 codes are ten a code; of 39, evenly sampled, the share of codes that stay unseen is not below 0.01 %."""
    assert token_count_remarks(torch.tensor([10, 10, 10, 10])) == []
    (remark,) = token_count_remarks(torch.tensor([10, 10, 10, 9]))
    assert "39 tokens for 4 codes" in remark


def test_anchors_that_stay_at_their_centers():
    statistics = tracked(torch.zeros(2, 9, 1, 1, 4, 2))
    for values in vars(statistics).values():
        assert values.abs().max() < 1e-6


def test_anchors_that_look_one_cell_to_the_right():
    offsets = torch.zeros(2, 9, 1, 1, 4, 2)
    offsets[..., 0] = 1
    statistics = tracked(offsets)
    torch.testing.assert_close(statistics.displacement, torch.ones(1, 9, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert statistics.spread.max() < 1e-3
    assert statistics.outside_cell.min() == 1
    # The right column looks past the edge of the image.
    assert statistics.outside_image.view(3, 3).tolist() == [[0, 0, 1]] * 3
    assert statistics.content_share.item() == pytest.approx(0, abs=1e-9)


def test_anchors_that_look_around_themselves():
    """Half the weight 0.4 cells up and half 0.4 down: no displacement, a spread of 0.4, all inside the own cell."""
    offsets = torch.zeros(1, 9, 1, 1, 2, 2)
    offsets[..., 0, 1], offsets[..., 1, 1] = 0.4, -0.4
    statistics = tracked(offsets)
    assert statistics.displacement.max() < 1e-6
    torch.testing.assert_close(statistics.spread, torch.full((1, 9), 0.4, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert statistics.outside_cell.max() == 0


def test_looking_elsewhere_in_each_image_is_content_dependence():
    offsets = torch.zeros(2, 9, 1, 1, 4, 2)
    offsets[0, ..., 0], offsets[1, ..., 0] = 1, -1
    assert tracked(offsets).content_share.item() == pytest.approx(1)


def test_evaluate_tokens_of_files(tmp_path):
    pipe = tiny_pipeline()
    files = write_images(tmp_path, 5)
    done = []
    result = evaluate_tokens(pipe, files, batch_size=2, progress_callback=done.append)
    tokens = pipe.tokenize(files)
    assert torch.equal(result.token_counts, tokens.flatten().bincount(minlength=64))
    assert result.position_entropy[4].item() == pytest.approx(entropy_bits(tokens[:, 4].bincount(minlength=64)).item())
    assert result.anchors.spread.shape == (2, 9)
    assert done == [2, 2, 1]
    # The first layer's queries know nothing of the image, so that its anchors look at the same places in each.
    assert result.anchors.content_share[0] == pytest.approx(0, abs=1e-6)
    assert sum(result.summary()["token_counts"]) == 5 * 9
