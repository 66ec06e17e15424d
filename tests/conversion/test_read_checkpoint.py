import argparse
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conversion.originals import AR, AR_CONFIG, DINOV2, LATENT_STATISTICS, RAR, TOKENIZER, assert_equal, tiny
from vfmtok_hf.conversion import CheckpointError, export_original_ar
from vfmtok_hf.conversion.build_models import build_ar
from vfmtok_hf.conversion.read_checkpoint import read_checkpoint, read_latent_statistics


@pytest.fixture
def weights():
    return tiny(RAR)


# -- containers


def test_moving_averages_and_last_weights_are_told_apart():
    # The usage history differs between them by construction: zeros in moving averages, past codes in the other.
    ema, model = (read_checkpoint(TOKENIZER, "tokenizer", weights) for weights in ("ema", "model"))
    assert (ema.entry, model.entry) == ("ema", "model")
    assert not ema.state_dict["slot_quantize.codebook_used"].any()
    assert model.state_dict["slot_quantize.codebook_used"].any()


@pytest.mark.parametrize(("entry", "choice"), [("module", "ema"), ("module", "model"), ("state_dict", "ema")])
def test_files_with_one_set_of_weights_are_read_either_way(weights, tmp_path, entry, choice):
    torch.save({entry: weights, "steps": 3}, tmp_path / "rar.pt")
    checkpoint = read_checkpoint(tmp_path / "rar.pt", "rar", choice)
    assert checkpoint.entry == entry
    assert_equal(checkpoint.state_dict, weights)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_bare_pickled_state_dicts(weights, tmp_path, suffix, zipped):
    path = tmp_path / f"rar.{suffix}"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path, "rar")
    assert checkpoint.entry is None
    assert_equal(checkpoint.state_dict, weights)


def test_safetensors(weights, tmp_path):
    save_file(weights, tmp_path / "rar.safetensors")
    assert_equal(read_checkpoint(tmp_path / "rar.safetensors", "rar").state_dict, weights)


# -- refusals, each one line that names the cause


def refusal(path, kind="rar", weights="ema"):
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path, kind, weights)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(("present", "wanted"), [("model", "ema"), ("ema", "model")])
def test_absent_weights_are_not_replaced_by_others(weights, tmp_path, present, wanted):
    torch.save({present: weights, "optimizer": {}}, tmp_path / "rar.pt")
    message = refusal(tmp_path / "rar.pt", weights=wanted)
    assert f"no '{wanted}' weights, only '{present}': use weights='{present}'" in message


def test_unknown_choice_of_weights():
    with pytest.raises(ValueError, match="weights must be 'ema' or 'model', got 'best'"):
        read_checkpoint(AR, "ar", "best")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        read_checkpoint(tmp_path / "absent.pt", "ar")


class Malicious:
    def __reduce__(self):
        return os.system, ("true",)


def test_pickled_code_is_refused_and_not_run(weights, tmp_path, monkeypatch):
    torch.save({"ema": weights, "args": Malicious()}, tmp_path / "rar.pt")
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("the pickle was executed"))
    message = refusal(tmp_path / "rar.pt")
    assert "pickle that calls" in message
    assert "system" in message


def test_training_arguments_are_allowed_for_the_length_of_one_read(weights, tmp_path):
    torch.save({"ema": weights, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "rar.pt")
    assert read_checkpoint(tmp_path / "rar.pt", "rar").entry == "ema"
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize(("path", "kind"), [(TOKENIZER, "tokenizer"), (RAR, "rar")])
def test_truncated_files(tmp_path, path, kind, share):
    content = path.read_bytes()
    cut = tmp_path / path.name
    cut.write_bytes(content[: int(len(content) * share)])
    assert "truncated" in refusal(cut, kind)


def test_truncated_legacy_pickle(weights, tmp_path):
    path = tmp_path / "rar.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x89PNG\r\n\x1a\n", bytes(100)])
def test_other_files(tmp_path, content):
    (tmp_path / "weights.pt").write_bytes(content)
    assert "not a PyTorch checkpoint" in refusal(tmp_path / "weights.pt")


def test_git_lfs_pointers(tmp_path):
    (tmp_path / "weights.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ([1, 2], "contains list"),
        ({}, "contains dict"),
        ({"optimizer": {}, "steps": 4}, "contains no weights: its entries are 'optimizer', 'steps'"),
        ({"some.weight": torch.zeros(1)}, "lacks 'timesteps_embeddings' and contains 'some.weight'"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, cause):
    torch.save(content, tmp_path / "weights.pt")
    assert cause in refusal(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("path", "kind", "cause"),
    [
        (AR, "tokenizer", "is a next-token (AR) generator checkpoint, not a VFMTok tokenizer checkpoint"),
        (RAR, "ar", "is a randomized-order (RAR) generator checkpoint, not"),
        (TOKENIZER, "rar", "is a VFMTok tokenizer checkpoint, not"),
        (DINOV2, "tokenizer", "is an original DINOv2 checkpoint, not"),
    ],
)
def test_checkpoints_of_another_kind(path, kind, cause):
    assert cause in refusal(path, kind)


def test_converted_checkpoints(tmp_path):
    model = build_ar(tiny(AR), AR_CONFIG).model
    model.save_pretrained(tmp_path)
    assert "already in Hugging Face format: load its folder with from_pretrained" in refusal(
        tmp_path / "model.safetensors", "ar"
    )
    assert "already converted" in refusal(tmp_path, "ar")
    assert export_original_ar(model)


def test_vision_models_in_hugging_face_format(tmp_path):
    torch.save({"embeddings.patch_embeddings.projection.weight": torch.zeros(1)}, tmp_path / "dinov2.bin")
    assert "pass its folder as vision_model" in refusal(tmp_path / "dinov2.bin", "dinov2")


# -- statistics of latents


def test_statistics_of_latents_are_read_as_the_original_and_as_tensors_store_them(tmp_path):
    statistics = read_latent_statistics(LATENT_STATISTICS)
    assert statistics.mean.shape == statistics.std.shape == (8, 16)
    save_file({"mean": statistics.mean, "std": statistics.std}, tmp_path / "stats.safetensors")
    torch.save({"mean": statistics.mean.numpy(), "var": statistics.std.numpy()}, tmp_path / "numpy2.pt")
    for name in ("stats.safetensors", "numpy2.pt"):
        read = read_latent_statistics(tmp_path / name)
        assert torch.equal(read.mean, statistics.mean)
        assert torch.equal(read.std, statistics.std)


def test_statistics_of_the_released_vfmae():
    statistics = read_latent_statistics("released")
    assert statistics.mean.shape == statistics.std.shape == (32, 256)
    assert statistics.mean.mean().item() == pytest.approx(0.036, abs=1e-3)
    assert statistics.std.min() > 0.23
    assert statistics.std.max() < 0.52


class Opens:
    """Pickles to a call of `open`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_statistics_run_no_code(tmp_path):
    torch.save({"mean": np.zeros((2, 4)), "var": Opens(str(tmp_path / "made"))}, tmp_path / "stats.pt")
    with pytest.raises(CheckpointError, match="open"):
        read_latent_statistics(tmp_path / "stats.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": np.zeros((2, 4))}, "must have 'mean' and 'var'"),
        ({"mean": np.full((2, 4), np.nan), "var": np.ones((2, 4))}, "is damaged"),
        ({"mean": np.zeros((2, 4)), "var": np.zeros((2, 4))}, "standard deviations positive"),
    ],
)
def test_bad_statistics_are_refused(tmp_path, content, message):
    torch.save({name: values.astype(np.float32) for name, values in content.items()}, tmp_path / "stats.pt")
    with pytest.raises(CheckpointError, match=message):
        read_latent_statistics(tmp_path / "stats.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "stats.pt").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_latent_statistics(tmp_path / "cut.pt")
