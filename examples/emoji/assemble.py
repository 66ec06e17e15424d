"""
Assemble the trained parts into the pipeline folder that ships with the package, in half precision, with a card that contains
the results.

    python examples/emoji/assemble.py --tokenizer runs/emoji/tokenizer_128/model \\
        --generator runs/emoji/generator_rar_128_longer/model --data data/emoji128 --vision-model data/efficientnet_lite0 \\
        --classifier data/efficientnet_lite0_classifier --second-judge data/judge64 --output src/vfmtok_hf/checkpoints/emoji
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from class_fidelity import JUDGED_SIZE, SAMPLES, check_classes, class_names, compare, image_files, load, resized
from PIL import Image
from prepare_data import attribution

from vfmtok_hf import VFMTokImageProcessor, VFMTokModel, VFMTokPipeline, VFMTokRARForImageGeneration
from vfmtok_hf.data.files import find_images
from vfmtok_hf.data.output_files import check_model_folder, whole_folder
from vfmtok_hf.evaluation.reconstruction import psnr
from vfmtok_hf.pipelines.portable_vfmtok import ENTRY_MODULES, INDEX_FILE, REQUIREMENTS_FILE, use_this_code
from vfmtok_hf.plotting import image_grid


# The card says how the temperature was chosen.
SAMPLING = {"temperature": 0.7, "top_k": 100}
# What the card's figure repaints, as left, top, right and bottom of an image of side 1: the center, and the upper half, whose
# tokens come first in raster order.
REPAINTED = [(0.25, 0.25, 0.75, 0.75), (0, 0, 1, 0.5)]

ENTRY = '''"""Where `DiffusionPipeline.from_pretrained(vfmtok_hf.DEFAULT_CHECKPOINT, trust_remote_code=True)` finds the class."""

from vfmtok_hf import VFMTokPipeline


__all__ = ["VFMTokPipeline"]
'''

# Remove the second paragraph if the tokenizer was trained on today's data from the start.
TRAINED_ON = """The weights in this folder were trained on emoji of these styles, scaled to 64 x 64 and 128 x 128 pixels on white.
`reconstructions.png` and `inpaint.png` show held-out emoji of the same styles.

For 64 x 64 pixels, with which it began, the tokenizer was trained on an earlier version of the data, with `noto` from
`emoji-datasource-google@16.0.0` and `twemoji` from `emoji-datasource-twitter@16.0.0`, and without `fxemoji` and `streamline`."""

# Numbers that are not in braces describe the shipped weights: measure them again after a new training.
CARD = """---
license: apache-2.0
library_name: diffusers
tags:
- vfmtok
- class-conditional-image-generation
---

# Emoji: the checkpoint that ships with vfmtok-hf

A small VFMTok pipeline that demonstrates every part of the package without a download. It generates {image_size} x {image_size} emoji of
{num_classes} classes ({class_names})
without classifier-free guidance, and repaints parts of images.

It generates only emoji. Its tokenizer was trained for two hours on one CPU, and its generator for four minutes on one NVIDIA H200 and
an hour and a half on that CPU. Do not judge full-size VFMTok by it.

![Four samples of each class](samples.png)

*Samples of seeds 0 to {last_seed}, not cherry-picked; {sampling}, no guidance.*

![Held-out emoji over their reconstructions](reconstructions.png)

*Held-out emoji (every second row) and their reconstructions from {num_anchors} tokens each.*

| part | description | parameters |
|---|---|---|
| vision model | EfficientNet-Lite0 up to stride 16, frozen, pretrained on ImageNet | {vision_parameters:,} |
| image tokenizer | {num_anchors} tokens from a codebook of {codebook_size}, 3 feature levels of different size | {tokenizer_parameters:,} |
| generator | randomized-order transformer (RAR), {layers} layers of width {width} | {generator_parameters:,} |

## Inpainting

```python
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline

pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
images = pipe.inpaint(image, "heart", mask).images  # mask: an image, white where to repaint
```

![Held-out emoji, what is kept of each, and images with the rest repainted](inpaint.png)

*The first held-out emoji of each class, its center repainted with seeds 0 and 1, and its upper half repainted with seeds 0 and 1, not cherry-picked;
{sampling}, no guidance.*

## Results
On {num_validation} held-out images (whole emoji were held out, in all styles and skin tones), with the weights of this
folder, PSNR is **{psnr:.2f} dB**, and {reduced_psnr:.2f} dB if the images are reduced to {judged_size} x {judged_size}; **{usage:.1%}** of the codebook is used.

{samples_per_class} samples of each class, not cherry-picked, judged at {judged_size} x {judged_size}:

{comparison}

The classifier is a logistic regression on EfficientNet-Lite0's features of the training images. The tokenizer uses the same network, which may
favor its samples. The second judge, a ResNet trained from scratch on the same images, shares no weights with it. Samples resemble typical
training images, so judges may recognize them more often than held-out emoji. All seven held-out flowers are wilted, and resemble no flower of
the training set. Precision, recall and the distance to the nearest training image are measured in EfficientNet's features; memorized samples
would be as close to a training image as reconstructions of training images are. The losses, PSNR and sharpness are measured on held-out
images; sharpness is the root mean square of the differences between neighboring pixels, and smaller images are enlarged first. *RAR, 64 x 64*
is the checkpoint before it was trained on 128 x 128 pixels, with its own temperature of 0.8.
`examples/emoji/class_fidelity.py` computes these numbers.

Animals are the weakest class: one label for 17 different heads. Reconstructions of training animals are recognized in 82.5 % of cases and samples in
55.0 %, so the generator limits them more than the tokenizer does. The classes of fewer than 100 images (cat, flower, zodiac) are not among the weak ones.

The first judge recognizes 87.9, 90.5 and 88.0 % of samples at temperatures 0.6, 0.7 and 0.8, by which 0.7 was chosen. Differences of this size are
partly chance: with 560 samples, the standard error is 1.2 points.

## Data
The training set has {num_training:,} images of Noto Emoji and FxEmoji (Apache-2.0), Twemoji, EmojiTwo and Streamline (CC-BY-4.0) and Fluent
Emoji (MIT). The tokenizer was first trained at 64 x 64 on an earlier version with 3,806 images in seven of the nine styles. All emoji
that are held out today were held out then as well, so no part of the checkpoint was trained on them. `ATTRIBUTION.md` lists sources and notices.
Some classes have fewer than 100 images, and their samples may resemble training images.

## Recipe
`make emoji-checkpoint` runs the recipe on today's data: `examples/emoji` describes its steps, and `configs/emoji` contains their settings. The
weights will differ from these, whose tokenizer began on the earlier data.

## License
The weights are licensed under Apache-2.0. The vision model's weights are Google's EfficientNet-Lite0, converted by ML Illustrated
(Apache-2.0); the notice is in `LICENSE.efficientnet-lite0`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="trained VFMTokModel")
    parser.add_argument("--generator", type=Path, required=True, help="trained VFMTokRARForImageGeneration")
    parser.add_argument("--data", type=Path, required=True, help="output folder of prepare_data.py")
    parser.add_argument("--vision-model", type=Path, required=True, help="output folder of vision_model.py")
    parser.add_argument("--classifier", required=True, help="output folder of vision_model.py --classifier")
    parser.add_argument("--second-judge", type=Path, required=True, help="output folder of examples/claims/judge.py")
    parser.add_argument(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FOLDER"),
        help="a pipeline for a column of the table",
    )
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write, or to replace")
    arguments = parser.parse_args()

    replaces = (arguments.output / INDEX_FILE).is_file() or None  # only a pipeline is replaced
    generators = [arguments.generator, *(Path(folder) / "transformer" for _, folder in arguments.compare)]
    try:
        check_model_folder(arguments.output, overwrite=replaces)
        check_classes(arguments.data, [*generators, arguments.second_judge])
    except (OSError, ValueError) as error:
        parser.error(str(error))

    with whole_folder(arguments.output, overwrite=replaces) as folder:
        save_pipeline(arguments.tokenizer, arguments.generator, folder)
        (folder / "ATTRIBUTION.md").write_text(attribution(TRAINED_ON))
        shutil.copy(arguments.vision_model / "LICENSE", folder / "LICENSE.efficientnet-lite0")
        pipes = {name: load(compared) for name, compared in arguments.compare} | {"samples": load(folder)}
        comparison = compare(pipes, arguments.data, arguments.classifier, str(arguments.second_judge))
        write_card(folder, arguments.data, comparison)


def save_pipeline(tokenizer: Path, generator: Path, folder: Path) -> None:
    vq_model = VFMTokModel.from_pretrained(tokenizer, dtype=torch.float16)
    vq_model.config.vision_config.name_or_path = ""  # a local folder
    transformer = VFMTokRARForImageGeneration.from_pretrained(generator, dtype=torch.float16)
    transformer.generation_config.update(do_sample=True, **SAMPLING)
    size = vq_model.config.image_size
    processor = VFMTokImageProcessor(size={"height": size, "width": size})
    VFMTokPipeline(vq_model, transformer, processor).save_pretrained(folder)
    leave_code_out(folder)


def leave_code_out(folder: Path) -> None:
    """Write the entry point of diffusers, which imports the installed package."""
    for code in folder.rglob("*.py"):
        code.unlink()
    (folder / REQUIREMENTS_FILE).unlink()
    entry_module = ENTRY_MODULES[VFMTokPipeline.__name__]
    (folder / f"{entry_module}.py").write_text(ENTRY)
    for file in folder.rglob("*.json"):
        settings = json.loads(file.read_text())
        settings.pop("auto_map", None)
        if file.name == INDEX_FILE:
            use_this_code(settings)
            settings["_class_name"] = [entry_module, settings["_class_name"]]
        file.write_text(json.dumps(settings, indent=2) + "\n")


def inpainting_grid(pipe: VFMTokPipeline, files: list[Path], results: int = 2) -> Image.Image:
    """For each file, in a folder of its class: the image, and for each of `REPAINTED` what is kept of it and the results."""
    size = pipe.vq_model.config.image_size
    pictures = []
    for file in files:
        original = Image.open(file).convert("RGB")
        pictures.append(original)
        for box in REPAINTED:
            mask = Image.new("L", (size, size))
            mask.paste(255, [round(size * edge) for edge in box])
            kept = original.copy()
            kept.paste("lightgray", mask=mask)
            seeds = [torch.Generator().manual_seed(seed) for seed in range(results)]
            pictures += [kept, *pipe.inpaint([file] * results, file.parent.name, mask, generator=seeds).images]
    return image_grid(pictures, columns=2 * (1 + len(REPAINTED) * (1 + results)))


def mean_psnr(originals: list[Image.Image], reconstructions: list[Image.Image], size: int) -> float:
    return psnr(resized(originals, size), resized(reconstructions, size)).mean().item()


def write_card(folder: Path, data: Path, comparison: str, samples_per_class: int = 4) -> None:
    pipe = load(folder)
    names = class_names(pipe.id2label)
    seeds = range(len(names) * samples_per_class)
    samples = pipe(
        list(range(len(names))),
        num_images_per_label=samples_per_class,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    captions = [name for name in names for _ in range(samples_per_class)]
    image_grid(samples, 2 * samples_per_class, captions).save(folder / "samples.png")

    files = list(find_images([data / "validation"]).values())
    tokens = pipe.tokenize(files)
    originals, reconstructions = [Image.open(file) for file in files], pipe.detokenize(tokens)
    shown = files[:: len(files) // 32][:32]
    pairs = list(zip(map(Image.open, shown), pipe.reconstruct(shown).images, strict=True))
    rows = [pairs[start : start + 8] for start in range(0, len(pairs), 8)]
    in_rows = [pair[side] for row in rows for side in (0, 1) for pair in row]
    image_grid(in_rows, columns=8).save(folder / "reconstructions.png")

    first_of_classes = [of_class[0] for of_class in image_files(data / "validation").values()]
    inpainting_grid(pipe, first_of_classes).save(folder / "inpaint.png")

    vision = pipe.vq_model.vision_model.num_parameters()
    card = CARD.format(
        image_size=pipe.vq_model.config.image_size,
        num_classes=len(names),
        class_names=", ".join(names),
        last_seed=seeds[-1],
        sampling=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in SAMPLING.items()),
        num_anchors=pipe.vq_model.config.num_anchors,
        codebook_size=pipe.vq_model.config.codebook_size,
        vision_parameters=vision,
        tokenizer_parameters=pipe.vq_model.num_parameters() - vision,
        generator_parameters=pipe.transformer.num_parameters(),
        layers=pipe.transformer.config.num_hidden_layers,
        width=pipe.transformer.config.hidden_size,
        num_training=len(find_images([data / "train"])),
        num_validation=len(files),
        samples_per_class=SAMPLES,
        comparison=comparison,
        psnr=mean_psnr(originals, reconstructions, pipe.vq_model.config.image_size),
        reduced_psnr=mean_psnr(originals, reconstructions, JUDGED_SIZE),
        judged_size=JUDGED_SIZE,
        usage=tokens.unique().numel() / pipe.vq_model.config.codebook_size,
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
