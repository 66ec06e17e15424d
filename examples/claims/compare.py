"""
Compare VFMTok with the VQGAN baseline: convergence of the generators, samples with and without guidance, and linear probes.

    for seed in 0 1 2; do
        python examples/claims/train.py --data data/emoji64 --vision-model data/efficientnet_lite0 --output runs/claims \\
            --variants region_adaptive vqgan --seed $seed
    done
    python examples/claims/judge.py --data data/emoji64 --output data/emoji_judge
    python examples/claims/compare.py --runs runs/claims --data data/emoji64 --output docs/assets \\
        --judges data/efficientnet_lite0_classifier data/emoji_judge

Each finished run's results are kept in its folder, in `comparison.json`. `--variants` and `--seeds` select runs, such as for
processes side by side. The output folder gets the figures and `claims_vqgan.json` with all results; the tables are printed.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import torch
from measure import NUM_IMAGES, PROBE, log_of, training_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from train import is_finished
from vqgan import load_tokenizer

from vfmtok_hf import VFMTokARForImageGeneration, VFMTokImageProcessor, VFMTokPipeline
from vfmtok_hf.data.files import find_images
from vfmtok_hf.data.image_sets import FolderImages
from vfmtok_hf.evaluation.features import VisionModelFeatures
from vfmtok_hf.evaluation.generation import balanced_labels
from vfmtok_hf.evaluation.linear_probe import LabeledImages, evaluate_linear_probe
from vfmtok_hf.evaluation.metrics import FeatureStatistics, frechet_distance, precision_recall
from vfmtok_hf.evaluation.reconstruction import evaluate_reconstruction
from vfmtok_hf.training.ema import EMA


VARIANTS = ("region_adaptive", "vqgan")
STEPS = (100, 200, 300, 400, 600, 800, 1000, 1200)
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
IMAGE_SIZE = 32
JUDGE_INPUT = 64
BATCH_SIZE = 100


class Images:
    """
    Image files at the tokenizers' size.

    Args:
        files (`list[Path]`): in folders of their classes.
    """

    def __init__(self, files: list[Path]):
        names = sorted({file.parent.name for file in files})
        self.labels = torch.tensor([names.index(file.parent.name) for file in files])
        self.pixels = torch.cat(list(FolderImages(files, IMAGE_SIZE).batches(BATCH_SIZE)))


class Judge:
    """
    A network that compares images with training images and classifies them, by logistic regression on its features.

    Args:
        folder (`Path`): of the network.
        train (`Images`): all training images, for the classifier.
        reference (`Images`): those that distances, precision and recall refer to.
        device (`str`): of the network.
    """

    def __init__(self, folder: Path, train: Images, reference: Images, device: str):
        self.extractor = VisionModelFeatures(str(folder), JUDGE_INPUT, device)
        self.name = folder.name
        regression = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
        self.classifier = make_pipeline(StandardScaler(), regression)
        self.classifier.fit(self.features(train.pixels).numpy(), train.labels.numpy())
        self.reference = self.features(reference.pixels)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.extractor(batch).pooled for batch in pixels.split(BATCH_SIZE)])

    def values(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """
        Args:
            pixels (`torch.Tensor` of shape `(images, 3, height, width)`): uint8.
            labels (`torch.Tensor` of shape `(images,)`): their classes.

        Returns:
            Fréchet `distance` to the reference, `precision`, `recall`, and the share of images that are classified `right`, as
            the mean over classes.
        """
        features = self.features(pixels)
        right = torch.from_numpy(self.classifier.predict(features.numpy())) == labels
        precision, recall = precision_recall(features, self.reference)
        return {
            "distance": frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(self.reference)),
            "right": mean(right[labels == label].float().mean().item() for label in labels.unique()),
            "precision": precision,
            "recall": recall,
        }


@contextmanager
def at_step(generator: VFMTokARForImageGeneration, run: Path, step: int) -> Iterator[None]:
    """Within the block, the generator has the averaged weights of its run's checkpoint."""
    averages = EMA(generator, decay=0.0)
    # The trainer registers its progress first and its averages second.
    file = run / "checkpoints" / f"step_{step:08d}" / "custom_checkpoint_1.pkl"
    averages.load_state_dict(torch.load(file, map_location=generator.device, weights_only=True))
    with averages.applied():
        yield


def measure_run(folder: Path, data: Path, judges: list[Judge], reference: Images, device: str) -> dict:
    """All results of one variant and seed, whose runs are in `folder`."""
    tokenizer = load_tokenizer(folder / "tokenizer" / "model").to(device)
    generator = VFMTokARForImageGeneration.from_pretrained(folder / "generator" / "model").eval().to(device)
    pipe = VFMTokPipeline(tokenizer, generator, VFMTokImageProcessor(size=IMAGE_SIZE))
    pipe.set_progress_bar_config(disable=True)
    labels = balanced_labels(NUM_IMAGES, generator.config.num_classes)

    def judged(pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, dict[str, float]]:
        return {judge.name: judge.values(pixels, labels) for judge in judges}

    def samples(guidance_scale: float = 1.0) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_IMAGES)]
        options = {"output_type": "uint8", "decode_batch_size": BATCH_SIZE, "guidance_scale": guidance_scale}
        return pipe(labels.tolist(), generator=generators, **options).images.cpu()

    held_out = list(find_images([data / "validation"]).values())
    reconstruction = evaluate_reconstruction(pipe, held_out).values
    reconstructed = pipe.detokenize(pipe.tokenize(list(reference.pixels)), "uint8").cpu()
    parts = (LabeledImages.open(data / part) for part in ("train", "validation"))
    probes = evaluate_linear_probe(tokenizer, *parts, PROBE)
    convergence = {}
    for step in STEPS:
        with at_step(generator, folder / "generator", step):
            convergence[step] = judged(samples(), labels)
    return {
        **{name: reconstruction[name] for name in ("psnr", "ssim", "codebook_usage", "codebook_perplexity")},
        "reconstructions": judged(reconstructed, reference.labels),
        "probes": {name: result.mean_class_accuracy for name, result in probes.items()},
        "losses": dict(zip(*log_of(folder / "generator", "validation", "loss"), strict=True)),
        "convergence": convergence,
        "guidance": {scale: judged(samples(scale), labels) for scale in GUIDANCE_SCALES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="output folder of train.py")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judges", type=Path, nargs="+", required=True, help="folders of classifiers")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = [arguments.runs / f"seed_{seed}" / variant for seed in arguments.seeds for variant in arguments.variants]
    missing = [
        folder
        for folder in folders
        if is_finished(folder / "generator") and not (folder / "comparison.json").is_file()
    ]
    if missing:
        train = Images(list(find_images([arguments.data / "train"]).values()))
        reference = Images(training_images(arguments.data))
        judges = [Judge(folder, train, reference, device) for folder in arguments.judges]
    for folder in missing:
        results = measure_run(folder, arguments.data, judges, reference, device)
        (folder / "comparison.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
