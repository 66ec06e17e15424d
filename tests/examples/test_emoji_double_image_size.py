"""A pixel decoder with one more level begins as nearest-neighbor upsampling."""

import sys
from pathlib import Path

import torch

from tests.testing import tiny_model
from vfmtok_hf import VFMTokModel


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import double_image_size


def last_states(model, image_tokens):
    """What the pixel decoder's last norm receives."""
    states = []
    hook = model.pixel_decoder.norm_out.register_forward_pre_hook(lambda _, inputs: states.append(*inputs))
    with torch.no_grad():
        model.decode(image_tokens=image_tokens)
    hook.remove()
    return states[0]


def test_the_new_level_repeats_pixels(tmp_path, run_script):
    small = tiny_model()
    small.save_pretrained(tmp_path / "small")
    run_script(double_image_size, tokenizer=tmp_path / "small", output=tmp_path / "large")
    large = VFMTokModel.from_pretrained(tmp_path / "large")

    assert large.config.image_size == 2 * small.config.image_size
    tokens = torch.randint(0, small.config.codebook_size, (2, small.config.num_anchors))
    repeated = last_states(small, tokens).repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(last_states(large, tokens), repeated)

    images = torch.rand(2, 3, large.config.image_size, large.config.image_size) * 2 - 1
    with torch.no_grad():
        features = large.extract_vision_features(images)
        torch.testing.assert_close(large.encode_features(features), small.encode_features(features))


def test_a_file_is_no_output(tmp_path, refusal):
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in refusal(double_image_size, tokenizer="nope", output=tmp_path / "file")


def test_it_trains():
    """Zeros at the end of a block pass no gradient to its beginning, but get one themselves."""
    large = double_image_size.double_image_size(tiny_model())
    tokens = torch.randint(0, large.config.codebook_size, (1, large.config.num_anchors))
    large.decode(image_tokens=tokens).reconstruction.square().sum().backward()
    for resnet in large.pixel_decoder.up_blocks[-1].resnets:
        assert resnet.conv2.weight.grad.abs().sum() > 0
