"""
Compare the two generators trained on the emoji tokenizer's tokens, and redraw a part of images with the RAR.

    python examples/emoji/compare_generators.py --pipeline src/vfmtok_hf/checkpoints/emoji \\
        --ar runs/emoji/generator --rar runs/emoji/generator_rar --images examples/images --output docs/assets

Writes `generators.png`, `inpainting.png` and `token_regions.png`, and prints the table of docs/generators.md.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from vfmtok_hf import VFMTokARForImageGeneration, VFMTokPipeline, VFMTokRARForImageGeneration
from vfmtok_hf.plotting import image_grid


SAMPLING = {"temperature": 0.9, "top_k": 100}
SAMPLES = 4


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def training_facts(run: Path) -> dict[str, float]:
    """Last validation loss, sequences seen, and seconds from the first to the last line of the log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    batch_size = int(next(x for x in (run / "arguments.yaml").read_text().split("\n") if "batch_size" in x).split()[1])
    return {
        "validation loss": [line["loss"] for line in lines if line["kind"] == "validation"][-1],
        "sequences": lines[-1]["step"] * batch_size,
        "minutes": (lines[-1]["time"] - lines[0]["time"]) / 60,
    }


def draw(pipe: VFMTokPipeline) -> tuple[list[Image.Image], float]:
    """`SAMPLES` images of each class, and the seconds of one image drawn alone."""
    labels = list(range(len(pipe.id2label)))
    images = pipe(labels, num_images_per_label=SAMPLES, generator=generators(SAMPLES * len(labels)), **SAMPLING).images
    start = time.perf_counter()
    pipe(0, output_type="tokens")
    return images, time.perf_counter() - start


def token_regions(pipe: VFMTokPipeline, picture: Image.Image, scale: int = 6) -> Image.Image:
    """Left: the cell of each token. Right: where three of the tokens look on the finest level, weight as opacity."""
    model = pipe.vq_model
    pixel_values = pipe.image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        encoded = model.encode(pixel_values, output_sampling_locations=True)
    side, grid = model.config.image_size * scale, model.config.anchor_grid_size
    enlarged = pipe.image_processor.postprocess(pixel_values, "pil")[0].resize((side, side), Image.Resampling.NEAREST)
    cells, overlaid = enlarged.copy(), enlarged.copy()
    lines = ImageDraw.Draw(cells)
    for index in range(grid + 1):
        position = index * side / grid
        lines.line((position, 0, position, side), "gray")
        lines.line((0, position, side, position), "gray")
    overlay = Image.new("RGBA", overlaid.size)
    dots = ImageDraw.Draw(overlay)
    for token, color in ((grid * 4 + 4, (220, 0, 0)), (grid * 6 + 8, (0, 90, 220)), (grid * 9 + 3, (0, 150, 0))):
        left, top = token % grid * side / grid, token // grid * side / grid
        dots.rectangle((left, top, left + side / grid, top + side / grid), outline=(*color, 255), width=3)
        locations = encoded.sampling_locations[-1][0, token].reshape(-1, 2) * side
        weights = encoded.attention_weights[-1][0, token].flatten()
        for (x, y), weight in zip(locations.tolist(), (weights / weights.max()).tolist(), strict=True):
            dots.ellipse((x - 6, y - 6, x + 6, y + 6), fill=(*color, int(255 * weight)))
    overlaid.paste(overlay, mask=overlay)
    return image_grid([cells, overlaid], 2)


def inpaint(pipe: VFMTokPipeline, files: list[Path]) -> Image.Image:
    """For each file: original, mask, reconstruction, three results with the lower half redrawn for its class."""
    size = pipe.vq_model.config.image_size
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).rectangle((0, size // 2, size, size), 255)
    row = []
    for file in files:
        original = Image.open(file).convert("RGB")
        results = [
            pipe.inpaint(original, file.stem, mask, generator=generator, **SAMPLING).images[0]
            for generator in generators(3)
        ]
        row += [original, mask.convert("RGB"), pipe.reconstruct(original).images[0], *results]
    return image_grid(row, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pipeline", "ar", "rar", "images", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()

    pipe = VFMTokPipeline.from_pretrained(arguments.pipeline)
    pictures, rows = {}, []
    models = (("AR", VFMTokARForImageGeneration, arguments.ar), ("RAR", VFMTokRARForImageGeneration, arguments.rar))
    for name, model_class, run in models:
        transformer = model_class.from_pretrained(run / "model").eval()
        generator_pipe = VFMTokPipeline(pipe.vq_model, transformer, pipe.image_processor)
        generator_pipe.set_progress_bar_config(disable=True)
        pictures[name], seconds = draw(generator_pipe)
        facts = training_facts(run)
        rows.append(
            f"| {name} | {transformer.num_parameters():,} | {facts['sequences']:,.0f} | {facts['minutes']:.0f} | "
            f"{facts['validation loss']:.3f} | {seconds:.2f} |"
        )
    print(
        "| generator | parameters | sequences trained on | minutes | validation loss (nats / token) | seconds an image |"
    )
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))

    by_class = [
        picture
        for label in range(len(pipe.id2label))
        for name in pictures
        for picture in pictures[name][label * SAMPLES : (label + 1) * SAMPLES]
    ]
    image_grid(by_class, 2 * SAMPLES).save(arguments.output / "generators.png")
    files = [arguments.images / f"{name}.png" for name in ("smiley", "heart", "person", "clock")]
    inpaint(generator_pipe, files).save(arguments.output / "inpainting.png")
    token_regions(pipe, Image.open(arguments.images / "smiley.png")).save(arguments.output / "token_regions.png")


if __name__ == "__main__":
    main()
