"""
Give a trained tokenizer one more level in its pixel decoder, so that the same tokens decode to images of twice the size.

    python examples/emoji/double_image_size.py --tokenizer runs/emoji/decoder/model --output runs/emoji/doubled

The new level begins as nearest-neighbor upsampling of the old states: its upsampling convolution passes its input on, and its
residual blocks add nothing. A training that starts from the result, as `configs/emoji/tokenizer_128.yaml` describes, has to
learn only what the larger image adds.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from vfmtok_hf import VFMTokConfig, VFMTokModel
from vfmtok_hf.data.output_files import check_output_folder


def double_image_size(small: VFMTokModel) -> VFMTokModel:
    """The same tokenizer for images of twice the size. The vision model sees as many pixels as before."""
    settings = small.config.to_dict()
    settings["image_size"] *= 2
    multipliers = settings["pixel_decoder_channel_multipliers"]  # from fine to coarse
    settings["pixel_decoder_channel_multipliers"] = [multipliers[0], *multipliers]
    large = VFMTokModel(VFMTokConfig(**settings))
    large.load_state_dict(large.state_dict() | small.state_dict())

    *_, before, new = large.pixel_decoder.up_blocks
    nn.init.dirac_(before.upsample.weight)
    nn.init.zeros_(before.upsample.bias)
    for resnet in new.resnets:
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
    return large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="trained VFMTokModel")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        check_output_folder(arguments.output)
    except OSError as error:
        parser.error(str(error))
    small = VFMTokModel.from_pretrained(arguments.tokenizer, dtype=torch.float32)
    double_image_size(small).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
