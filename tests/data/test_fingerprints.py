"""Digests of files, settings and weights."""

import copy

import torch
from torch import nn

from vfmtok_hf.data.fingerprints import file_sha256, json_sha256, weights_sha256


def test_a_digest_changes_with_names_values_and_precision_of_what_is_not_skipped():
    layer = nn.Linear(2, 2)
    digest = weights_sha256(layer)
    assert digest == weights_sha256(copy.deepcopy(layer))
    assert digest != weights_sha256(nn.Sequential(layer))
    assert digest != weights_sha256(layer, layer)
    with torch.no_grad():
        layer.bias[0] += 1
    assert digest != weights_sha256(layer)
    without_bias = weights_sha256(layer, skip=("bias",))
    with torch.no_grad():
        layer.bias[0] += 1
    assert without_bias == weights_sha256(layer, skip=("bias",))
    assert weights_sha256(layer) != weights_sha256(layer.to(torch.bfloat16))


def test_a_digest_of_a_file_is_that_of_its_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_digest_of_settings_does_not_change_with_their_order():
    digest = json_sha256({"seed": 0, "crops": {"count": 4, "scale": [0.8, 1.0]}})
    assert digest == json_sha256({"crops": {"scale": (0.8, 1.0), "count": 4}, "seed": 0})
    assert digest != json_sha256({"seed": 1, "crops": {"count": 4, "scale": [0.8, 1.0]}})
