"""
Compare the two generators trained on the emoji tokenizer's tokens.

    python examples/emoji/compare_generators.py --tokenizer runs/emoji/decoder/model \\
        --ar runs/emoji/generator --rar runs/emoji/generator_rar --output docs/assets

Writes `generators.png` and prints the table of docs/generators.md.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from PIL import Image

from vfmtok_hf import (
    VFMTokARForImageGeneration,
    VFMTokImageProcessor,
    VFMTokModel,
    VFMTokPipeline,
    VFMTokRARForImageGeneration,
)
from vfmtok_hf.data.output_files import check_output_file, save_picture
from vfmtok_hf.plotting import image_grid


SAMPLING = {"temperature": 0.8, "top_k": 100}
SAMPLES = 4


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def training_facts(run: Path) -> dict[str, float]:
    """Last validation loss and training sequences."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    batch_size = yaml.safe_load((run / "arguments.yaml").read_text())["batch_size"]
    return {
        "validation loss": [line["loss"] for line in lines if line["kind"] == "validation"][-1],
        "sequences": lines[-1]["step"] * batch_size,
    }


def draw(pipe: VFMTokPipeline) -> list[Image.Image]:
    """`SAMPLES` images of each class."""
    labels = list(range(len(pipe.id2label)))
    return pipe(labels, num_images_per_label=SAMPLES, generator=generators(SAMPLES * len(labels)), **SAMPLING).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tokenizer", "ar", "rar", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    output = arguments.output / "generators.png"
    try:
        check_output_file(output)
    except OSError as error:
        parser.error(str(error))

    tokenizer = VFMTokModel.from_pretrained(arguments.tokenizer)
    size = tokenizer.config.image_size
    processor = VFMTokImageProcessor(size={"height": size, "width": size})
    pictures, rows = {}, []
    models = (("AR", VFMTokARForImageGeneration, arguments.ar), ("RAR", VFMTokRARForImageGeneration, arguments.rar))
    for name, model_class, run in models:
        transformer = model_class.from_pretrained(run / "model").eval()
        pipe = VFMTokPipeline(tokenizer, transformer, processor)
        pipe.set_progress_bar_config(disable=True)
        pictures[name] = draw(pipe)
        facts = training_facts(run)
        sequences, loss = facts["sequences"], facts["validation loss"]
        rows.append(f"| {name} | {transformer.num_parameters():,} | {sequences:,.0f} | {loss:.3f} |")
    print("| generator | parameters | training sequences | validation loss in the trainer's log (nats / token) |")
    print("|---|---|---|---|")
    print("\n".join(rows))

    by_class = [
        picture
        for start in range(0, len(pictures["AR"]), SAMPLES)
        for of_generator in pictures.values()
        for picture in of_generator[start : start + SAMPLES]
    ]
    save_picture(image_grid(by_class, 2 * SAMPLES), output)


if __name__ == "__main__":
    main()
