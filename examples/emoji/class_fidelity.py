"""
Measure how often pipelines generate the requested class, according to a classifier.

    python examples/emoji/class_fidelity.py --data data/emoji128 --classifier data/efficientnet_lite0_classifier \\
        --second-judge data/judge64 --pipelines src/vfmtok_hf/checkpoints/emoji

The classifier is a logistic regression on EfficientNet-Lite0's pooled features of the training images. The emoji tokenizer
uses the same network, which may favor its samples; `--second-judge` is a network of its own, trained by
`examples/claims/judge.py --image-size 64`. The script prints a Markdown table: the share of correctly classified held-out
images, reconstructions and samples; the distance to the nearest training image, which shows whether training images are
repeated; precision and recall (Kynkäänniemi et al. 2019) of the samples against training images in EfficientNet's features,
which distinguish quality from diversity; the losses on held-out images; and how close and how sharp their reconstructions
are. All images are judged at 64 x 64, and reconstructions are compared at the size of the data.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoConfig

from vfmtok_hf import VFMTokPipeline, VFMTokRARForImageGeneration
from vfmtok_hf.data.files import check_file, find_images
from vfmtok_hf.evaluation.features import VisionModelFeatures
from vfmtok_hf.evaluation.metrics import precision_recall
from vfmtok_hf.evaluation.reconstruction import psnr


JUDGED_SIZE = 64  # all images are reduced to it, so that tables of pipelines of several image sizes compare
INPUT_SIZE = 128  # input size of the classifier
BATCH_SIZE = 28
SAMPLES = 40  # per class; the smallest class has 68 training images


def image_files(folder: Path) -> dict[str, list[Path]]:
    """By class, in the order of their names, which is that of the labels."""
    files = defaultdict(list)
    for file in find_images([folder]).values():
        files[file.parent.name].append(file)
    return dict(sorted(files.items()))


def class_names(id2label: dict[int, str]) -> list[str]:
    """The first name of each class."""
    return [id2label[label].split(",")[0] for label in sorted(id2label)]


def check_classes(data: Path, models: Iterable[Path]) -> None:
    """
    Check in advance that the class folders of both splits are the classes of all models, in the order of their labels.

    Raises:
        FileNotFoundError: there is no model, or a split has no images.
        ValueError: classes differ.
    """
    splits = {folder: list(image_files(folder)) for folder in (data / "train", data / "validation")}
    for model in models:
        check_file(model / "config.json")
        expected = class_names(AutoConfig.from_pretrained(model).id2label or {})
        for folder, found in splits.items():
            for label, (of_data, of_model) in enumerate(zip_longest(found, expected, fillvalue="missing")):
                if of_data != of_model:
                    raise ValueError(f"Class {label} is {of_data} in {folder}, but {of_model} in {model}.")


def features_of(pictures: Iterable[Image.Image], extractor: VisionModelFeatures) -> torch.Tensor:
    return torch.cat([extractor(batch).pooled for batch in resized(pictures, JUDGED_SIZE).split(BATCH_SIZE)])


def resized(pictures: Iterable[Image.Image], size: int) -> torch.Tensor:
    """`(num_images, 3, size, size)` uint8."""
    images = (picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS) for picture in pictures)
    return torch.stack([pil_to_tensor(image) for image in images])


def train_judge(features: list[torch.Tensor]) -> Pipeline:
    labels = [label for label, rows in enumerate(features) for _ in rows]
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000))
    return judge.fit(torch.cat(features).numpy(), labels)


def shares_right(judge: Pipeline, features: list[torch.Tensor]) -> list[float]:
    """By class."""
    return [float((judge.predict(rows.numpy()) == label).mean()) for label, rows in enumerate(features)]


def load(folder: Path) -> VFMTokPipeline:
    pipe = VFMTokPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: VFMTokPipeline, count: int) -> list[list[Image.Image]]:
    """Generate `count` samples of each class. Sample i of every class has seed i."""
    return [
        pipe(
            label,
            num_images_per_label=count,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        ).images
        for label in range(len(pipe.id2label))
    ]


def spread_evenly(length: int, count: int) -> torch.Tensor:
    """`count` indices, spread evenly over a class of `length` images."""
    return torch.linspace(0, length - 1, count).long()


@torch.no_grad()
def held_out_losses(pipe: VFMTokPipeline, files: list[list[Path]]) -> list[float]:
    """Nats per token in raster order, and of a RAR in one random order per image, with equal weights for all images."""
    losses = torch.zeros(2 if isinstance(pipe.transformer, VFMTokRARForImageGeneration) else 1)
    randomness = torch.Generator().manual_seed(0)
    for label, of_class in enumerate(files):
        tokens = pipe.tokenize(of_class)
        labels = torch.full((len(tokens),), label)
        random_orders = torch.rand(tokens.shape, generator=randomness).argsort(-1)
        for index, options in zip(range(len(losses)), ({}, {"orders": random_orders}), strict=False):
            losses[index] += len(tokens) * pipe.transformer(labels, tokens, return_loss=True, **options).loss
    return (losses / sum(map(len, files))).tolist()


def image_quality(pipe: VFMTokPipeline, files: list[list[Path]]) -> list[str]:
    """PSNR of reconstructions, and their sharpness relative to the originals. Smaller images are enlarged."""
    originals = [Image.open(file) for of_class in files for file in of_class]
    size = originals[0].width
    references = resized(originals, size)
    reconstructions = resized((image for of_class in files for image in pipe.reconstruct(of_class).images), size)
    decibels = psnr(references, reconstructions).mean()
    return [f"{decibels:.2f} dB", f"{sharpness(reconstructions) / sharpness(references):.0%}"]


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """Root mean square of the differences between neighboring pixels, which blur reduces."""
    squares = [images.float().diff(dim=dim).square().mean() for dim in (-2, -1)]
    return torch.stack(squares).mean().sqrt()


def compare(
    pipes: dict[str, VFMTokPipeline], data: Path, classifier: str, second_judge: str, samples: int = SAMPLES
) -> str:
    """The table of pipelines by name, with `samples` per class and reconstructions by the last one's tokenizer."""
    extractor, second = VisionModelFeatures(classifier, INPUT_SIZE), VisionModelFeatures(second_judge)
    train_files = list(image_files(data / "train").values())
    train = [features_of(map(Image.open, of_class), extractor) for of_class in train_files]
    judge, reference = train_judge(train), torch.cat([rows[spread_evenly(len(rows), samples)] for rows in train])

    files = list(image_files(data / "validation").values())
    *_, last = pipes.values()
    columns = {
        "held-out images": [[Image.open(file) for file in of_class] for of_class in files],
        "reconstructions, held-out": [last.reconstruct(of_class).images for of_class in files],
        "reconstructions, training": [
            last.reconstruct([of_class[index] for index in spread_evenly(len(of_class), samples)]).images
            for of_class in train_files
        ],
    }
    cells = {}
    for name, pictures in {**columns, **{name: draw(pipe, samples) for name, pipe in pipes.items()}}.items():
        features = [features_of(of_class, extractor) for of_class in pictures]
        cells[name] = [*class_cells(judge, features), second_share(second, pictures), nearest(features, train)]
        if name in pipes:
            shares = precision_recall(torch.cat(features), reference)
            losses = [f"{loss:.3f}" for loss in held_out_losses(pipes[name], files)]
            cells[name] += [f"{share:.0%}" for share in shares] + losses + [""] * (2 - len(losses))
            cells[name] += image_quality(pipes[name], files)
        else:
            cells[name] += [""] * 6

    names = [
        *class_names(last.id2label),
        "**mean of classes**",
        "**mean, second judge**",
        "distance to the nearest training image",
    ]
    names += ["precision", "recall", "loss, nats per token", "loss in random orders"]
    names += ["PSNR of reconstructions", "sharpness of reconstructions, relative to the originals"]
    rows = [["classified correctly", *cells], ["---"] * (1 + len(cells)), *zip(names, *cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def second_share(judge: VisionModelFeatures, pictures: list[list[Image.Image]]) -> str:
    """Share that a classifier recognizes, as the mean over classes."""
    shares = []
    for label, of_class in enumerate(pictures):
        batches = resized(of_class, JUDGED_SIZE).split(BATCH_SIZE)
        predictions = torch.cat([judge(batch).logits.argmax(-1) for batch in batches])
        shares.append((predictions == label).float().mean())
    return f"**{torch.stack(shares).mean().item():.1%}**"


def nearest(features: list[torch.Tensor], train: list[torch.Tensor]) -> str:
    """Median distance to the nearest training image, in standardized features."""
    deviations, means = torch.std_mean(torch.cat(train), dim=0)
    scaled, references = (torch.cat(rows).sub(means) / deviations.clamp_min(1e-6) for rows in (features, train))
    return f"{torch.cdist(scaled, references).amin(1).median():.1f}"


def class_cells(judge: Pipeline, features: list[torch.Tensor]) -> list[str]:
    """Share of correctly classified images, per class and as the mean over classes."""
    shares = shares_right(judge, features)
    return [*(f"{share:.1%}" for share in shares), f"**{sum(shares) / len(shares):.1%}**"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="output folder of prepare_data.py")
    parser.add_argument("--classifier", required=True, help="output folder of vision_model.py --classifier")
    parser.add_argument("--second-judge", type=Path, required=True, help="output folder of examples/claims/judge.py")
    parser.add_argument("--pipelines", type=Path, nargs="+", required=True, help="pipeline folders")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="samples per class, at most the number of its training images"
    )
    arguments = parser.parse_args()
    generators = [folder / "transformer" for folder in arguments.pipelines]
    try:
        check_classes(arguments.data, [*generators, arguments.second_judge])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    pipes = {str(folder): load(folder) for folder in arguments.pipelines}
    print(compare(pipes, arguments.data, arguments.classifier, str(arguments.second_judge), arguments.samples))


if __name__ == "__main__":
    main()
