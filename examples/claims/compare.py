"""
Compare VFMTok with the VQGAN baseline: convergence of the generators, samples with and without guidance, and linear probes.

    for seed in 0 1 2; do
        python examples/claims/train.py --data data/emoji64 --vision-model data/efficientnet_lite0 --output runs/claims \\
            --variants region_adaptive vqgan --seed $seed
    done
    python examples/claims/judge.py --data data/emoji64 --output data/judge
    python examples/claims/compare.py --runs runs/claims --data data/emoji64 --output docs/assets \\
        --judges data/efficientnet_lite0_classifier data/judge

Each finished run's results are kept in its folder, in `comparison.json`. `--variants` and `--seeds` select runs, such as for
processes side by side. The output folder gets the figures and `claims_vqgan.json` with all results; the tables are printed.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from statistics import mean, stdev

import torch
from judge import open_splits
from matplotlib.figure import Figure
from measure import NUM_IMAGES, PROBE, table, training_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from train import is_finished
from vqgan import load_tokenizer

from vfmtok_hf import VFMTokARForImageGeneration, VFMTokImageProcessor, VFMTokPipeline
from vfmtok_hf.data.files import find_images
from vfmtok_hf.data.image_sets import FolderImages
from vfmtok_hf.data.output_files import check_output_folder
from vfmtok_hf.evaluation.features import VisionModelFeatures
from vfmtok_hf.evaluation.generation import balanced_labels
from vfmtok_hf.evaluation.linear_probe import LabeledImages, evaluate_linear_probe
from vfmtok_hf.evaluation.metrics import FeatureStatistics, frechet_distance, precision_recall
from vfmtok_hf.evaluation.reconstruction import evaluate_reconstruction
from vfmtok_hf.plotting import save_figure
from vfmtok_hf.training.ema import EMA


VARIANTS = {"region_adaptive": "VFMTok, 36 tokens", "vqgan": "VQGAN, 81 tokens"}
COLORS = {"region_adaptive": "#2f6fb0", "vqgan": "#c0392b"}
METRICS = {"distance": "FD ↓", "right": "judged right ↑", "recall": "recall ↑"}
QUANTITIES = {"distance": "FD", "excess": "FD above reconstructions", "right": "judged right"}
JUDGES = {"efficientnet_lite0_classifier": "EfficientNet-Lite0", "judge": "ResNet from scratch"}
STEPS = (100, 200, 300, 400, 600, 800, 1000, 1200)
MILESTONES = (300, 600, 1200)
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
IMAGE_SIZE = 32
JUDGE_INPUT = 64
BATCH_SIZE = 100


class Images:
    """
    Image files at the tokenizers' size.

    Args:
        files (`list[Path]`): in folders of their classes.
        class_names (`list[str]`): in the order of the labels. Not all need to have files.
    """

    def __init__(self, files: list[Path], class_names: list[str]):
        self.class_names = class_names
        self.labels = torch.tensor([class_names.index(file.parent.name) for file in files])
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
            Fréchet `distance` to the reference, `recall`, and the share of images that are classified `right`, as the mean over
            classes.
        """
        features = self.features(pixels)
        right = torch.from_numpy(self.classifier.predict(features.numpy())) == labels
        _, recall = precision_recall(features, self.reference)
        return {
            "distance": frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(self.reference)),
            "right": mean(right[labels == label].float().mean().item() for label in labels.unique()),
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

    def samples(guidance_scale: float = GUIDANCE_SCALES[0]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_IMAGES)]
        options = {"output_type": "uint8", "decode_batch_size": BATCH_SIZE, "guidance_scale": guidance_scale}
        return pipe(labels.tolist(), generator=generators, **options).images.cpu()

    held_out_files = list(find_images([data / "validation"]).values())
    held_out = Images(held_out_files, reference.class_names)
    reconstruction = evaluate_reconstruction(pipe, held_out_files).values
    reconstructed = pipe.detokenize(pipe.tokenize(list(reference.pixels)), "uint8").cpu()
    parts = (LabeledImages.open(data / part) for part in ("train", "validation"))
    probes = evaluate_linear_probe(tokenizer, *parts, PROBE)
    convergence = {}
    for step in STEPS:
        with at_step(generator, folder / "generator", step):
            convergence[step] = judged(samples(), labels)
    # The saved weights are those of the last step, so samples without guidance would be the same.
    guidance = {GUIDANCE_SCALES[0]: convergence[STEPS[-1]]}
    for scale in GUIDANCE_SCALES[1:]:
        guidance[scale] = judged(samples(scale), labels)
    return {
        **{name: reconstruction[name] for name in ("psnr", "ssim", "codebook_usage", "codebook_perplexity")},
        "held_out": judged(held_out.pixels, held_out.labels),
        "reconstructions": judged(reconstructed, reference.labels),
        "probes": {name: result.mean_class_accuracy for name, result in probes.items()},
        "convergence": convergence,
        "guidance": guidance,
    }


# ---------------------------------------------------------------------------------------------------------------
# Report: `runs` holds the results of each variant, one entry per seed


def steps_to_reach(steps: list[int], values: list[float], target: float) -> float | None:
    """The first step, linearly interpolated, at which a falling curve reaches the target. None if it never does."""
    if values[0] <= target:
        return steps[0]
    for number in range(1, len(steps)):
        before, after = values[number - 1], values[number]
        if after <= target:
            return steps[number - 1] + (before - target) / (before - after) * (steps[number] - steps[number - 1])
    return None


def falling_curve(results: dict, judge: str, quantity: str) -> list[float]:
    """A key of `QUANTITIES` over the steps, lower is better."""
    values = [samples[judge] for samples in results["convergence"].values()]
    if quantity == "right":
        return [-value["right"] for value in values]
    floor = results["reconstructions"][judge]["distance"] if quantity == "excess" else 0
    return [value["distance"] - floor for value in values]


def steps_for_same_quality(runs: dict[str, list[dict]], judge: str, quantity: str, step: int) -> str:
    """The steps after which VFMTok's samples are as good as VQGAN's at `step`, for each seed."""
    found = []
    for vfmtok, vqgan in zip(runs["region_adaptive"], runs["vqgan"], strict=True):
        steps = [int(number) for number in vfmtok["convergence"]]
        target = falling_curve(vqgan, judge, quantity)[steps.index(step)]
        reached = steps_to_reach(steps, falling_curve(vfmtok, judge, quantity), target)
        found.append("not reached" if reached is None else f"{'≤ ' if reached == steps[0] else ''}{reached:.0f}")
    return ", ".join(found)


def with_deviation(values: list[float], digits: int = 0, unit: str = "") -> str:
    """Mean and standard deviation over the seeds; the unit "%" multiplies by 100."""
    scale = 100 if unit else 1
    return f"{scale * mean(values):.{digits}f} ± {scale * stdev(values):.{digits}f}{unit}"


def column(*path: str, digits: int = 0, unit: str = "") -> Callable[[list[dict]], str]:
    """A table's column of the value at a path into each seed's results."""
    return lambda results: with_deviation([reduce(getitem, path, result) for result in results], digits, unit)


def judged_columns(*metrics: str) -> dict[str, Callable[[list[dict]], str]]:
    return {
        f"{METRICS[metric]}, {shown}": column(judge, metric, unit="" if metric == "distance" else "%")
        for judge, shown in JUDGES.items()
        for metric in metrics
    }


def gain_column(judge: str, scale: float) -> Callable[[list[dict]], str]:
    """What guidance adds to the share that is judged right."""

    def cell(results: list[dict]) -> str:
        guided, plain = ([result[str(s)][judge]["right"] for result in results] for s in (scale, GUIDANCE_SCALES[0]))
        return with_deviation([after - before for after, before in zip(guided, plain, strict=True)], 0, "%")

    return cell


def tables(runs: dict[str, list[dict]]) -> list[str]:
    """The tables of docs/claims.md: tokenizers, reconstructions, convergence, guidance, its gain, probes."""

    def rows(*path: str) -> dict[str, list]:
        return {VARIANTS[variant]: [reduce(getitem, path, r) for r in results] for variant, results in runs.items()}

    tokenizer_columns = {
        "PSNR (dB) ↑": column("psnr", digits=2),
        "SSIM ↑": column("ssim", digits=3),
        "usage ↑": column("codebook_usage", unit="%"),
        "perplexity ↑": column("codebook_perplexity"),
    }
    step_columns = {
        f"{shown_quantity}, {shown_judge}": partial(steps_for_same_quality, runs, judge, quantity)
        for judge, shown_judge in JUDGES.items()
        for quantity, shown_quantity in QUANTITIES.items()
    }
    guidance_rows = {
        f"{name}, {scale}": [result["guidance"][str(scale)] for result in runs[variant]]
        for variant, name in VARIANTS.items()
        for scale in GUIDANCE_SCALES
    }
    gain_columns = {
        f"{scale}, {shown}": gain_column(judge, scale)
        for judge, shown in JUDGES.items()
        for scale in GUIDANCE_SCALES[1:]
    }
    probe_columns = {name: column(name, digits=1, unit="%") for name in ("image_embeds", "token_embeddings", "pixels")}
    return [
        table("tokenizer", rows(), tokenizer_columns),
        table("reconstructions", rows("reconstructions"), judged_columns("distance", "right")),
        table("VQGAN's step", {str(step): step for step in MILESTONES}, step_columns),
        table("samples, guidance scale", guidance_rows, judged_columns("distance", "right", "recall")),
        table("judged right, gain by guidance", rows("guidance"), gain_columns),
        table("probe", rows("probes"), probe_columns),
    ]


def convergence_figure(runs: dict[str, list[dict]]) -> Figure:
    """Plot what the judges say of samples over the generators' steps, with standard deviations over seeds."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (judge, metric) in zip(
        figure.subplots(2, 2, sharex=True).flat,
        [(judge, metric) for judge in JUDGES for metric in ("distance", "right")],
        strict=True,
    ):
        scale = 1 if metric == "distance" else 100
        for variant, results in runs.items():
            steps = [int(step) for step in results[0]["convergence"]]
            values = [
                [scale * result["convergence"][str(step)][judge][metric] for result in results] for step in steps
            ]
            middle, spread = [mean(row) for row in values], [stdev(row) for row in values]
            axes.errorbar(steps, middle, spread, color=COLORS[variant], capsize=3, marker=".", label=VARIANTS[variant])
            limit = mean(result["reconstructions"][judge][metric] for result in results)
            axes.axhline(scale * limit, color=COLORS[variant], linestyle=":", linewidth=1)
        axes.set(title=JUDGES[judge], ylabel="Fréchet distance" if metric == "distance" else "judged right (%)")
    for axes in figure.axes[2:]:
        axes.set_xlabel("step of the generator")
    figure.axes[0].legend(frameon=False)
    return figure


def check_report(output: Path, files: dict[str, list[Path]], missing: list[Path]) -> None:
    """Check in advance that the results of all variants and seeds will exist, and that the output can be written."""
    for file in (file for of_variant in files.values() for file in of_variant):
        if file.parent not in missing and not file.is_file():
            raise FileNotFoundError(
                f"--output needs all variants and seeds, and there is no finished run in {file.parent}"
            )
    if any(len(of_variant) < 2 for of_variant in files.values()):
        raise ValueError("--output shows deviations over seeds: pass two or more --seeds")
    check_output_folder(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="output folder of train.py")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--judges", type=Path, nargs=len(JUDGES), required=True, help=f"folders named {' and '.join(JUDGES)}"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder for figure and results, once all runs are measured")
    arguments = parser.parse_args()
    if {folder.name for folder in arguments.judges} != JUDGES.keys():
        parser.error(f"--judges must be folders named {' and '.join(JUDGES)}, as the tables show them")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = [arguments.runs / f"seed_{seed}" / variant for seed in arguments.seeds for variant in arguments.variants]
    files = {
        v: [arguments.runs / f"seed_{seed}" / v / "comparison.json" for seed in arguments.seeds] for v in VARIANTS
    }
    missing = [
        folder
        for folder in folders
        if is_finished(folder / "generator") and not (folder / "comparison.json").is_file()
    ]
    if not missing and not any((folder / "comparison.json").is_file() for folder in folders):
        parser.error(f"no finished run in {arguments.runs}")
    try:
        if arguments.output:
            check_report(arguments.output, files, missing)
        if missing:
            names = open_splits(arguments.data)[0].class_names
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if missing:
        train = Images(list(find_images([arguments.data / "train"]).values()), names)
        reference = Images(training_images(arguments.data), names)
        judges = [Judge(folder, train, reference, device) for folder in arguments.judges]
    for folder in missing:
        results = measure_run(folder, arguments.data, judges, reference, device)
        (folder / "comparison.json").write_text(json.dumps(results, indent=1))
    if arguments.output:
        runs = {variant: [json.loads(file.read_text()) for file in files[variant]] for variant in VARIANTS}
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "claims_vqgan.json").write_text(json.dumps(runs, indent=1))
        save_figure(convergence_figure(runs), arguments.output / "claims_vqgan.png")
        print(*tables(runs), sep="\n\n")


if __name__ == "__main__":
    main()
