"""
Evaluate the models of `train.py`, and plot the figures of docs/claims.md.

    python examples/emoji/vision_model.py --output data/efficientnet_lite0_classifier --classifier
    python examples/claims/measure.py --runs runs/claims/seed_0 --data data/emoji64 --features data/efficientnet_lite0_classifier \\
        --output docs/assets
    python examples/claims/measure.py --runs runs/claims/seed_1 --data data/emoji64 --features data/efficientnet_lite0_classifier \\
        --output docs/assets --name claims_seed_1

Unfinished variants are skipped, and existing results in the runs' `measurements.json` are reused. All results are written to
`NAME.json` in the output folder, the figures to `NAME_convergence.png`, `NAME_probes.png` and `NAME_guidance.png`. The tables
are printed.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from train import is_finished

from vfmtok_hf import VFMTokARForImageGeneration, VFMTokImageProcessor, VFMTokModel, VFMTokPipeline
from vfmtok_hf.data.files import find_images
from vfmtok_hf.data.image_sets import FolderImages
from vfmtok_hf.data.output_files import check_output_folder
from vfmtok_hf.evaluation.features import VisionModelFeatures, extract_features
from vfmtok_hf.evaluation.generation import SampleFolder, SampleFolderSettings, generate_samples, model_fingerprint
from vfmtok_hf.evaluation.linear_probe import LabeledImages, ProbeSettings, evaluate_linear_probe
from vfmtok_hf.evaluation.metrics import FeatureStatistics, frechet_distance, inception_score, precision_recall
from vfmtok_hf.evaluation.reconstruction import evaluate_reconstruction
from vfmtok_hf.evaluation.tokens import evaluate_tokens
from vfmtok_hf.plotting import plot_guidance, save_figure


COLORS = {
    "region_adaptive": "#2f6fb0",
    "fixed_grid": "#d9822b",
    "no_feature_reconstruction": "#4a9d5b",
    "random_encoder": "#9b59b6",
}
NUM_IMAGES = 700
FEATURE_SIZE = 64
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
NUM_DRAWS = 3
SAMPLE_METRICS = ("fid", "inception_score", "precision", "recall")
PROBE = ProbeSettings(epochs=30, warmup_epochs=3, views=1, base_learning_rates=(1.0, 10.0))


def log_of(run: Path, kind: str, value: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity in a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line[value] for line in lines if line["kind"] == kind}
    return list(found), list(found.values())


def training_images(data: Path) -> list[Path]:
    """Random training images, the same for every distance."""
    files = list(find_images([data / "train"]).values())
    return [
        files[index] for index in torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:NUM_IMAGES]
    ]


def measure_tokenizer(run: Path, data: Path, extractor: VisionModelFeatures) -> dict:
    model = VFMTokModel.from_pretrained(run / "model").eval()
    pipe = VFMTokPipeline(model, None, VFMTokImageProcessor(size=model.config.image_size))
    held_out = list(find_images([data / "validation"]).values())
    of_held_out = evaluate_reconstruction(pipe, held_out).values
    files = training_images(data)
    originals = extract_features(FolderImages(files, model.config.image_size), extractor).pooled
    pixels = pipe.detokenize(pipe.tokenize(files), "uint8")
    reconstructions = torch.cat([extractor(batch).pooled for batch in pixels.split(32)])
    anchors = evaluate_tokens(pipe, held_out).summary()["anchors_by_layer"]
    probe_images = (LabeledImages.open(data / part) for part in ("train", "validation"))
    probes = evaluate_linear_probe(model, *probe_images, PROBE)
    return {
        **{name: of_held_out[name] for name in ("psnr", "ssim", "codebook_usage", "codebook_perplexity")},
        "rfid": frechet_distance(FeatureStatistics.of(reconstructions), FeatureStatistics.of(originals)),
        "outside_cell": anchors["outside_cell"],
        "probe_mean_class_accuracy": {name: result.mean_class_accuracy for name, result in probes.items()},
    }


def measure_samples(
    run: Path, tokenizer_run: Path, data: Path, extractor: VisionModelFeatures, guidance_scale: float = 1.0
) -> dict[str, list[float]]:
    """Each metric of `NUM_DRAWS` independent sets of samples, as a list. Their differences are the sampling noise."""
    tokenizer = VFMTokModel.from_pretrained(tokenizer_run / "model").eval()
    generator = VFMTokARForImageGeneration.from_pretrained(run / "model").eval()
    size, num_classes = tokenizer.config.image_size, generator.config.num_classes
    pipe = VFMTokPipeline(tokenizer, generator, VFMTokImageProcessor(size=size))
    pipe.set_progress_bar_config(disable=True)
    real = extract_features(FolderImages(training_images(data), size), extractor).pooled
    values: dict[str, list[float]] = {metric: [] for metric in SAMPLE_METRICS}
    for draw in range(NUM_DRAWS):
        settings = SampleFolderSettings(NUM_IMAGES, seed=draw * NUM_IMAGES, guidance_scale=guidance_scale)
        folder = run / "evaluation" / f"guidance_{guidance_scale:g}_seed_{settings.seed}"
        samples = SampleFolder(folder, settings, num_classes, model_fingerprint(pipe))
        generate_samples(pipe, samples)
        drawn = extract_features(samples, extractor)
        measured = (
            frechet_distance(FeatureStatistics.of(drawn.pooled), FeatureStatistics.of(real)),
            inception_score(drawn.logits),
            *precision_recall(drawn.pooled, real),
        )
        for metric, value in zip(SAMPLE_METRICS, measured, strict=True):
            values[metric].append(value)
    return values


def convergence_figure(runs: Path, measurements: dict[str, dict]) -> Figure:
    """Plot PSNR of the tokenizers and validation loss of the generators over their steps."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = dict(zip(("tokenizer", "generator"), figure.subplots(1, 2), strict=True))
    for job, quantity in (("tokenizer", "psnr"), ("generator", "loss")):
        for variant, color in COLORS.items():
            if variant in measurements[job]:
                curve = log_of(runs / variant / job, "validation", quantity)
                panels[job].plot(*curve, color=color, marker=".", label=variant.replace("_", " "))
        panels[job].legend(frameon=False)
    panels["tokenizer"].set(xlabel="step", ylabel="PSNR (dB)", title="tokenizer, held-out images")
    panels["generator"].set(xlabel="step", ylabel="nats per token", title="generator on its tokens, held-out images")
    return figure


def probe_figure(tokenizers: dict[str, dict]) -> Figure:
    """Plot the accuracy of the linear probes, as the mean over classes."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    names = ["image_embeds", "token_embeddings", "vision_model", "pixels"]
    width = 0.8 / len(tokenizers)
    for number, (variant, values) in enumerate(tokenizers.items()):
        places = [place + (number - (len(tokenizers) - 1) / 2) * width for place in range(len(names))]
        heights = [100 * values["probe_mean_class_accuracy"][name] for name in names]
        axes.bar(places, heights, width, color=COLORS[variant], label=variant.replace("_", " "))
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(ylabel="accuracy, mean over classes (%)", ylim=(0, 100), title="linear probes, held-out images")
    axes.legend(frameon=False, ncols=2)
    return figure


def plot_figures(runs: Path, measurements: dict[str, dict], features: str, output: Path, name: str) -> None:
    save_figure(convergence_figure(runs, measurements), output / f"{name}_convergence.png")
    save_figure(probe_figure(measurements["tokenizer"]), output / f"{name}_probes.png")
    means = {
        float(scale): {metric: mean(values[metric]) for metric in SAMPLE_METRICS}
        for scale, values in measurements["guidance"].items()
    }
    if means:
        save_figure(plot_guidance(list(means), list(means.values()), features), output / f"{name}_guidance.png")


def with_range(values: list[float], digits: int) -> str:
    """The mean, and half of the range."""
    return f"{mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def table(first: str, rows: dict[str, dict], columns: dict[str, Callable[[dict], str]]) -> str:
    lines = [f"| {first} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, values in rows.items():
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cell(values) for cell in columns.values())} |")
    return "\n".join(lines)


TOKENIZER_COLUMNS = {
    "PSNR (dB) ↑": lambda m: f"{m['psnr']:.2f}",
    "SSIM ↑": lambda m: f"{m['ssim']:.3f}",
    "usage ↑": lambda m: f"{m['codebook_usage']:.0%}",
    "perplexity ↑": lambda m: f"{m['codebook_perplexity']:.0f}",
    "rFD ↓": lambda m: f"{m['rfid']:.0f}",
    "attention outside the cell, layer 1 / 2": lambda m: " / ".join(f"{share:.0%}" for share in m["outside_cell"]),
}
PROBE_COLUMNS = {
    name: lambda m, name=name: f"{m['probe_mean_class_accuracy'][name]:.1%}"
    for name in ("image_embeds", "token_embeddings", "vision_model", "pixels")
}
SAMPLE_COLUMNS = {
    "FD ↓": lambda m: with_range(m["fid"], 0),
    "IS ↑": lambda m: with_range(m["inception_score"], 2),
    "precision ↑": lambda m: with_range(m["precision"], 2),
    "recall ↑": lambda m: with_range(m["recall"], 3),
}
GENERATOR_COLUMNS = {"loss (nats / token)": lambda m: f"{m['loss']:.3f}", **SAMPLE_COLUMNS}


def tables(measurements: dict[str, dict]) -> list[str]:
    """The tables of docs/claims.md."""
    return [
        table("variant", measurements["tokenizer"], TOKENIZER_COLUMNS),
        table("variant", measurements["tokenizer"], PROBE_COLUMNS),
        table("variant", measurements["generator"], GENERATOR_COLUMNS),
        table("guidance scale", measurements["guidance"], SAMPLE_COLUMNS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("runs", "data", "features", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--name", default="claims", help="start of the names of the output files [claims]")
    arguments = parser.parse_args()
    file = arguments.runs / "measurements.json"
    measurements = (
        json.loads(file.read_text()) if file.is_file() else {"tokenizer": {}, "generator": {}, "guidance": {}}
    )
    if not measurements["tokenizer"] and not any(is_finished(arguments.runs / name / "tokenizer") for name in COLORS):
        parser.error(f"no finished run in {arguments.runs}")
    try:
        check_output_folder(arguments.output)
    except OSError as error:
        parser.error(str(error))
    extractor = VisionModelFeatures(str(arguments.features), FEATURE_SIZE)

    def keep(part: str, name: str, values: dict) -> None:
        measurements[part][name] = values
        file.write_text(json.dumps(measurements, indent=1))

    for variant in COLORS:
        run = arguments.runs / variant / "tokenizer"
        if is_finished(run) and variant not in measurements["tokenizer"]:
            keep("tokenizer", variant, measure_tokenizer(run, arguments.data, extractor))
    for variant in COLORS:
        folder = arguments.runs / variant
        if is_finished(folder / "generator") and variant not in measurements["generator"]:
            loss = log_of(folder / "generator", "validation", "loss")[1][-1]
            samples = measure_samples(folder / "generator", folder / "tokenizer", arguments.data, extractor)
            keep("generator", variant, {"loss": loss, **samples})
    first = arguments.runs / "region_adaptive"
    for scale in GUIDANCE_SCALES:
        if is_finished(first / "generator") and str(scale) not in measurements["guidance"]:
            values = measure_samples(first / "generator", first / "tokenizer", arguments.data, extractor, scale)
            keep("guidance", str(scale), values)
    plot_figures(arguments.runs, measurements, extractor.name, arguments.output, arguments.name)
    shutil.copyfile(file, arguments.output / f"{arguments.name}.json")
    print(*tables(measurements), sep="\n\n")


if __name__ == "__main__":
    main()
