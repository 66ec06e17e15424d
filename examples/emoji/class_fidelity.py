"""
How often a pipeline draws the class it was asked for, in the eyes of a classifier that it never met.

    python examples/emoji/class_fidelity.py --data data/emoji64 --vision-model data/efficientnet_lite0_classifier \\
        --pipelines src/vfmtok_hf/checkpoints/emoji

The judge is a logistic regression on EfficientNet-Lite0's pooled features of the training images. Prints a Markdown table:
the share that it puts into the right class, by class, of held-out images, of their reconstructions, and of samples; the
mean over classes; precision and recall (Kynkäänniemi et al. 2019) of the samples against training images in the same
features, which tell good drawings from few different ones.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from vfmtok_hf import VFMTokPipeline
from vfmtok_hf.evaluation.features import VisionModelFeatures
from vfmtok_hf.evaluation.metrics import precision_recall


INPUT_SIZE = 128  # of the judge, in pixels: twice that of the emoji
BATCH_SIZE = 28


def image_files(folder: Path) -> list[list[Path]]:
    """By class, in the order of their names, which is that of the labels."""
    return [sorted(path.glob("*.png")) for path in sorted(folder.iterdir())]


def features_of(pictures: Iterable[Image.Image], extractor: VisionModelFeatures) -> torch.Tensor:
    processed = torch.stack([to_tensor(picture) for picture in pictures])
    return torch.cat([extractor(batch).pooled for batch in processed.split(BATCH_SIZE)])


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """`(3, height, width)` uint8."""
    values = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1)


def train_judge(features: list[torch.Tensor]) -> Pipeline:
    labels = [label for label, rows in enumerate(features) for _ in rows]
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000))
    return judge.fit(torch.cat(features).numpy(), labels)


def shares_right(judge: Pipeline, features: list[torch.Tensor]) -> list[float]:
    """By class."""
    return [float((judge.predict(rows.numpy()) == label).mean()) for label, rows in enumerate(features)]


def draw(pipe: VFMTokPipeline, count: int) -> list[list[Image.Image]]:
    """`count` samples of each class; sample i of every class has seed i."""
    return [
        pipe(
            label,
            num_images_per_label=count,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        ).images
        for label in range(len(pipe.id2label))
    ]


def spread_evenly(features: list[torch.Tensor], count: int) -> torch.Tensor:
    """As many rows of each class, spread over all that it has."""
    return torch.cat([rows[torch.linspace(0, len(rows) - 1, count).long()] for rows in features])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--vision-model", required=True, help="folder that vision_model.py --classifier wrote")
    parser.add_argument("--pipelines", type=Path, nargs="+", required=True, help="pipeline folders with one tokenizer")
    parser.add_argument(
        "--samples", type=int, default=30, help="of each class; at most as many as its training images"
    )
    arguments = parser.parse_args()

    extractor = VisionModelFeatures(arguments.vision_model, INPUT_SIZE)
    train = [features_of(map(Image.open, files), extractor) for files in image_files(arguments.data / "train")]
    judge = train_judge(train)
    reference = spread_evenly(train, arguments.samples)

    pipes = {folder.name: VFMTokPipeline.from_pretrained(folder) for folder in arguments.pipelines}
    held_out = image_files(arguments.data / "validation")
    first = next(iter(pipes.values()))
    columns = {
        "held-out images": [features_of(map(Image.open, files), extractor) for files in held_out],
        "reconstructions": [features_of(first.reconstruct(files).images, extractor) for files in held_out],
    }
    manifolds = dict.fromkeys(columns, ("", ""))
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        columns[name] = [features_of(images, extractor) for images in draw(pipe, arguments.samples)]
        manifolds[name] = tuple(f"{share:.0%}" for share in precision_recall(torch.cat(columns[name]), reference))

    shares = {name: shares_right(judge, features) for name, features in columns.items()}
    rows = [
        [first.id2label[label].split(",")[0], *(f"{share[label]:.0%}" for share in shares.values())]
        for label in first.id2label
    ]
    rows.append(["**mean of classes**", *(f"**{sum(share) / len(share):.0%}**" for share in shares.values())])
    rows += [
        [name, *(values[index] for values in manifolds.values())] for index, name in enumerate(("precision", "recall"))
    ]
    print(
        "\n".join(
            f"| {' | '.join(row)} |" for row in [["judged right", *columns], ["---"] * (1 + len(columns)), *rows]
        )
    )


if __name__ == "__main__":
    main()
