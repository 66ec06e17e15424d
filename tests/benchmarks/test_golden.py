"""The comparison with the original's numbers that runs on GPUs, on the CPU."""

from pathlib import Path

import pytest
import torch

from vfmtok_hf import VFMTokARForImageGeneration


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tokenizer", "AR", "RAR"])
def test_within_bounds(name, dtype, monkeypatch):
    import golden

    # Compiled steps have tests of their own, and this one no minutes.
    monkeypatch.setattr(golden.VFMTokARForImageGeneration, "compile_decoding", lambda model: None)
    monkeypatch.setattr(golden.VFMTokRARForImageGeneration, "compile_decoding", lambda model: None)
    rows = golden.compare(name, dtype, "cpu")
    assert {row["within"] for row in rows if row["bound"]} == {"yes"}
    assert sum(bool(row["bound"]) for row in rows) >= 1


def test_other_weights_are_out_of_bounds(monkeypatch):
    import golden

    load = VFMTokARForImageGeneration.from_pretrained.__func__

    @torch.no_grad()
    def load_others(cls, *arguments, **options):
        model = load(cls, *arguments, **options)
        model.layers[0].mlp.up_proj.weight *= 1.01
        return model

    monkeypatch.setattr(VFMTokARForImageGeneration, "from_pretrained", classmethod(load_others))
    monkeypatch.setattr(VFMTokARForImageGeneration, "compile_decoding", lambda model: None)
    rows = golden.compare("AR", torch.float32, "cpu")
    assert "no" in {row["within"] for row in rows}
