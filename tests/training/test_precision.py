"""What is fastest where it runs."""

import pytest
import torch

from vfmtok_hf.cpu import precision as cpu_precision
from vfmtok_hf.cpu.attention import BLOCKWISE_ATTENTION
from vfmtok_hf.training import precision
from vfmtok_hf.training.precision import choose_attention, choose_mixed_precision


@pytest.mark.parametrize(
    ("device", "mixed_precision", "dropout", "expected"),
    [
        ("cpu", "no", 0.0, "sdpa"),
        ("cpu", "no", 0.1, BLOCKWISE_ATTENTION),
        ("cpu", "bf16", 0.0, BLOCKWISE_ATTENTION),
        ("cuda", "bf16", 0.1, "sdpa"),
    ],
)
def test_attention_that_is_fastest_where_it_runs(device, mixed_precision, dropout, expected):
    setting = torch.device(device), mixed_precision, dropout
    assert choose_attention("auto", *setting) == expected
    assert {choose_attention(named, *setting) for named in ("sdpa", "eager")} == {"sdpa", "eager"}


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, "bf16"), (0.9, "no"), (11.0, "no")])
def test_automatic_precision_is_what_this_cpu_computes_faster(seconds, expected, monkeypatch, caplog):
    times = {torch.bfloat16: seconds, torch.float32: 1.0}
    monkeypatch.setattr(cpu_precision, "seconds_of_linear", lambda dtype, rows: times[dtype])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with caplog.at_level("INFO", "vfmtok_hf.training"):
        assert choose_mixed_precision("auto") == expected
    assert f"mixed_precision auto: {expected}" in caplog.text
    assert {choose_mixed_precision(named) for named in ("no", "bf16")} == {"no", "bf16"}


def test_a_gpu_that_emulates_bfloat16_trains_in_float32(monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, real=supported: real)
        assert precision.has_fast_bfloat16(torch.device("cuda")) == supported
