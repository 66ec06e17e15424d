"""The moving average: its values, its place in validation and export, its way through a checkpoint."""

import pytest
import torch
from torch import nn

from vfmtok_hf.training.ema import EMA


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def trajectory(steps):
    """Values of weight and buffer after each step."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, 2, 3, generator=generator)


def averaged(model, values, decay):
    ema = EMA(model, decay)
    for step, (weight, mean) in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.copy_(weight)
            model.mean.copy_(mean)
            model.count.fill_(step)
        ema.update()
    return ema


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_equals_the_closed_form(decay):
    """average = sum over steps of (1 - d_k) * value_k * product of the later d, with d_k = min(d, (1 + k) / (10 + k))."""
    values = trajectory(40)
    ema = averaged(Scaled(), values, decay)
    decays = torch.tensor([min(decay, (1 + step) / (10 + step)) for step in range(1, 41)], dtype=torch.float64)
    later = torch.cat([decays.flip(0).cumprod(0).flip(0)[1:], torch.ones(1)])
    expected = (((1 - decays) * later)[:, None, None] * values.double()).sum(0)
    # float32 against float64 over 40 additions
    torch.testing.assert_close(ema.averages["weight"].double(), expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ema.averages["mean"].double(), expected[1], atol=1e-6, rtol=0)
    assert ema.averages["count"] == 40
    assert "frozen" not in ema.averages


def test_a_restored_average_goes_on_where_it_was():
    values = trajectory(20)
    whole = averaged(Scaled(), values, 0.9)
    model = Scaled()
    half = averaged(model, values[:10], 0.9)
    state = {"updates": half.updates, "averages": {name: value.clone() for name, value in half.averages.items()}}
    restored = EMA(Scaled(), 0.9)
    restored.load_state_dict(state)
    restored.model = model
    for weight, mean in values[10:]:
        with torch.no_grad():
            model.weight.copy_(weight)
            model.mean.copy_(mean)
        restored.update()
    assert torch.equal(restored.averages["weight"], whole.averages["weight"])
    assert torch.equal(restored.averages["mean"], whole.averages["mean"])


def test_low_precision_weights_are_averaged_in_float32():
    """1 + 1e-3 is 1 in bfloat16: an average in that precision would never move."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    ema = EMA(model, 0.999)
    ema.updates = 100_000
    model.weight.data.fill_(2.0)
    ema.update()
    assert ema.averages["weight"].item() == pytest.approx(1.001, abs=1e-6)


def test_ema_converges_to_constant_weights_and_tracks_buffers():
    model = nn.BatchNorm1d(2)
    model.bias.requires_grad_(False)
    ema = EMA(model, decay=0.9)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(5)
        model.running_mean.fill_(3)
        model.num_batches_tracked.fill_(7)
    ema.update()
    decay = 2 / 11  # (1 + updates) / (10 + updates) while that is below the given one
    torch.testing.assert_close(ema.averages["weight"], decay * start + (1 - decay) * 5)
    assert "bias" not in ema.averages
    assert ema.averages["num_batches_tracked"] == 7
    for _ in range(300):
        ema.update()
    torch.testing.assert_close(ema.averages["running_mean"], torch.full((2,), 3.0))


def test_ema_is_applied_only_inside_the_block():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    own = model.weight.detach().clone()
    ema.averages["weight"].fill_(1)
    with ema.applied():
        assert (model.weight == 1).all()
    assert torch.equal(model.weight, own)
    restored = EMA(nn.Linear(2, 2), decay=0.5)
    restored.load_state_dict(ema.state_dict())
    assert torch.equal(restored.averages["weight"], ema.averages["weight"])
