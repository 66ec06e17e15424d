"""
Train a small ResNet on the emoji from scratch: a judge of samples that shares no weights with any tokenizer.

    python examples/claims/judge.py --data data/emoji64 --image-size 32 --output data/judge

The output folder holds a `TimmWrapperForImageClassification`, a network for `vfmtok evaluate generation --features`. It is
trained on images of `--image-size`, the size of the samples, which are enlarged to its input of 64 x 64.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from vfmtok_hf.data.image_datasets import ImageDataset
from vfmtok_hf.data.output_files import check_output_folder
from vfmtok_hf.data.sources import ImageRecords, open_records
from vfmtok_hf.data.transforms import Augmentation


INPUT_SIZE = 64
EPOCHS = 25
BATCH_SIZE = 64
LEARNING_RATE = 2e-3


def build_judge(class_names: list[str]) -> TimmWrapperForImageClassification:
    """ResNet-18 with half of its channels. Its input is in [-1, 1]."""
    config = TimmWrapperConfig(
        architecture="resnet18",
        model_args={"channels": [32, 64, 128, 256]},
        id2label=dict(enumerate(class_names)),
        pretrained_cfg={"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, INPUT_SIZE, INPUT_SIZE]},
    )
    return TimmWrapperForImageClassification(config)


def enlarge(pixel_values: torch.Tensor) -> torch.Tensor:
    return F.interpolate(pixel_values, (INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)


def open_splits(data: Path) -> tuple[ImageRecords, ImageRecords]:
    """
    Training and held-out images, whose labels have the same numbers.

    Raises:
        FileNotFoundError: a split does not exist or has no images.
        ValueError: the splits have different classes.
    """
    for folder in (data / "train", data / "validation"):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")
    train, test = (open_records(data / part) for part in ("train", "validation"))
    if train.class_names != test.class_names:
        differing = ", ".join(sorted({*train.class_names} ^ {*test.class_names}))
        raise ValueError(f"{train.source} and {test.source} have different classes: {differing}.")
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be 1 or more")
    try:
        check_output_folder(arguments.output)
        train, test = open_splits(arguments.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if len(train) < BATCH_SIZE:
        parser.error(f"{train.source} has {len(train)} images, and a step of training needs {BATCH_SIZE}")
    set_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    augmentation = Augmentation(arguments.image_size, (0.85, 1.15), horizontal_flip=True)
    images = ImageDataset(train, augmentation, cache_images=True)
    batches = DataLoader(images, BATCH_SIZE, shuffle=True, drop_last=True)
    judge = build_judge(train.class_names).to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, arguments.epochs * len(batches))
    for epoch in range(arguments.epochs):
        images.set_epoch(epoch)
        for batch in batches:
            logits = judge(pixel_values=enlarge(batch["pixel_values"].to(device))).logits
            loss = F.cross_entropy(logits, batch["label"].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    judge.eval()
    right = 0
    with torch.no_grad():
        for batch in DataLoader(ImageDataset(test, Augmentation(arguments.image_size)), BATCH_SIZE):
            logits = judge(pixel_values=enlarge(batch["pixel_values"].to(device))).logits
            right += (logits.argmax(-1).cpu() == batch["label"]).sum().item()
    judge.save_pretrained(arguments.output)
    print(f"{right / len(test):.1%} of {len(test)} held-out images are classified correctly: {arguments.output}")


if __name__ == "__main__":
    main()
