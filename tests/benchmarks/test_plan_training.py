"""The plan of the paper's trainings counts what formulas say."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.tiny_runs import FORK


@pytest.fixture
def measure(monkeypatch):
    """
    The script's function, in a process of its own: where a fake tensor has had a backward pass, torch refuses one in all
    processes that are forked later, as other tests do.
    """
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from plan_training import measure

    def measure_apart(*arguments):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=lambda: sender.send(measure(*arguments)))
        process.start()
        process.join()
        assert process.exitcode == 0
        return receiver.recv()

    return measure_apart


def test_counts_of_a_layer(measure):
    """y = x W, then squared: 2 * in * out FLOPs forward, the same for the gradient of W and of x."""

    def build():
        layer = nn.Linear(64, 32, bias=False)
        return nn.Sequential(nn.Linear(16, 64, bias=False).requires_grad_(False), layer)

    cost = measure(build, lambda model, images: model(torch.zeros(images, 16)).square().sum())
    # The frozen layer runs forward only; the input of the other has no gradient.
    assert cost.flops == 2 * 16 * 64 + 2 * (2 * 64 * 32)
    assert (cost.trained, cost.frozen) == (64 * 32, 16 * 64)
    # bfloat16 inputs of the trained layer, and its bfloat16 outputs or their float32 copies for the square
    assert 2 * 64 + 2 * 32 <= cost.activation_bytes <= 2 * 64 + (2 + 4) * 32


def test_a_generator_costs_six_flops_for_each_weight_and_token(measure):
    from vfmtok_hf import VFMTokARConfig, VFMTokARForImageGeneration

    config = VFMTokARConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        codebook_size=128,
        num_image_tokens=16,
        num_classes=10,
    )

    def loss_of(model, images):
        zeros = torch.zeros(images, 16, dtype=torch.int64)
        return model(class_labels=zeros[:, 0], image_tokens=zeros, return_loss=True).loss

    cost = measure(lambda: VFMTokARForImageGeneration(config), loss_of)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 128
    # Attention itself: two products of tokens x tokens x hidden size for each layer, forward; up to 2.5 times that back.
    attention = 2 * 2 * 2 * 16 * 16 * 64
    assert 6 * 16 * weights + 3 * attention == pytest.approx(cost.flops, rel=0.05)
