"""Digests of weights."""

import copy

import torch
from torch import nn

from vfmtok_hf.data.fingerprints import weights_sha256


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
