"""
Count the held-out images whose tokens are most likely under their own class, and compute their losses: with the fine-tuned
generator, and with the one that it started from, whose new classes equal the null class.

    python examples/finetune/recognize.py runs/finetune
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from vfmtok_hf import VFMTokRARForImageGeneration
from vfmtok_hf.data.token_sets import TokenSet
from vfmtok_hf.training.finetuning import Generator, load_generator


@torch.no_grad()
def most_likely_classes(generator: Generator, image_tokens: torch.Tensor) -> torch.Tensor:
    """Class `(images,)` under which all tokens of an image, `(images, num_image_tokens)`, are most likely."""
    classes = torch.arange(generator.config.num_classes)
    found = []
    for tokens in image_tokens:
        copies = tokens.expand(len(classes), -1)
        logits = generator(class_labels=classes, image_tokens=copies).logits
        losses = F.cross_entropy(logits.transpose(1, 2), copies, reduction="none").sum(dim=1)
        found.append(losses.argmin())
    return torch.stack(found)


@torch.no_grad()
def losses(generator: Generator, labels: torch.Tensor, image_tokens: torch.Tensor) -> str:
    """Nats per token in raster order and, of a RAR, in one random order per image."""
    orders: dict[str, dict] = {"raster order": {}}
    if isinstance(generator, VFMTokRARForImageGeneration):
        numbers = torch.rand(image_tokens.shape, generator=torch.Generator().manual_seed(0))
        orders["random orders"] = {"orders": numbers.argsort(dim=-1)}
    values = {name: generator(labels, image_tokens, return_loss=True, **order).loss for name, order in orders.items()}
    return ", ".join(f"{loss:.3f} nats per token in {name}" for name, loss in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of vfmtok train generator")
    run = parser.parse_args().run
    if not (run / "model").is_dir():
        parser.error(f"{run} contains no finished run")
    data = TokenSet(run / "tokens" / "validation")
    rows = [data[row] for row in range(len(data))]
    labels, image_tokens = (
        torch.tensor([row["label"] for row in rows]),
        torch.stack([row["image_tokens"] for row in rows]),
    )
    settings = yaml.safe_load((run / "arguments.yaml").read_text())
    before = load_generator(settings["init_from"])
    before.resize_class_embeddings(data.class_names)
    for name, generator in (("before", before), ("after", load_generator(str(run / "model")))):
        is_right = most_likely_classes(generator.eval(), image_tokens) == labels
        counts = [
            f"{label} {int(is_right[labels == row].sum())}/{int((labels == row).sum())}"
            for row, label in enumerate(data.class_names)
        ]
        print(f"{name}: {int(is_right.sum())} of {len(labels)} recognized: {', '.join(counts)}")
        print(f"{name}: {losses(generator, labels, image_tokens)}")


if __name__ == "__main__":
    main()
