"""
Measure what `train.py` trained, and draw the figures of docs/claims.md.

    python examples/emoji/vision_model.py --output data/efficientnet_lite0_classifier --classifier
    python examples/claims/measure.py --runs runs/claims --data data/emoji64 --features data/efficientnet_lite0_classifier \\
        --output docs/assets

Variants that are not finished are left out. Writes `measurements.json` into the folder of the runs, prints the tables.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

from vfmtok_hf import VFMTokARForImageGeneration, VFMTokImageProcessor, VFMTokModel, VFMTokPipeline
from vfmtok_hf.evaluation.features import VisionModelFeatures, extract_features
from vfmtok_hf.evaluation.generation import SampleFolder, SamplingSettings, draw_samples, model_fingerprint
from vfmtok_hf.evaluation.images import FolderImages
from vfmtok_hf.evaluation.linear_probe import ProbeSettings, evaluate_linear_probe
from vfmtok_hf.evaluation.metrics import Reference, compare_features
from vfmtok_hf.evaluation.plots import save_figure
from vfmtok_hf.evaluation.reconstruction import evaluate_reconstruction
from vfmtok_hf.evaluation.tokens import evaluate_tokens
from vfmtok_hf.token_files import find_images


VARIANTS = ("region_adaptive", "fixed_grid", "no_feature_reconstruction", "random_encoder")
COLOURS = ("#2f6fb0", "#d9822b", "#4a9d5b", "#9b59b6")
NUM_IMAGES = 700
FEATURE_SIZE = 64
PROBE = ProbeSettings(epochs=30, warmup_epochs=3, views=1)


def log_of(run: Path, kind: str, value: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity in a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line[value] for line in lines if line["kind"] == kind}
    return list(found), list(found.values())


def measure(variant: Path, data: Path, extractor: VisionModelFeatures) -> dict:
    """Numbers of one variant: tokenizer, probes, and samples of its generator."""
    tokenizer = VFMTokModel.from_pretrained(variant / "tokenizer" / "model").eval()
    generator = VFMTokARForImageGeneration.from_pretrained(variant / "generator" / "model").eval()
    size = tokenizer.config.image_size
    pipe = VFMTokPipeline(tokenizer, generator, VFMTokImageProcessor(size=size))
    pipe.set_progress_bar_config(disable=True)
    held_out = list(find_images([data / "validation"]).values())
    train = list(find_images([data / "train"]).values())
    train = [train[index] for index in torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:NUM_IMAGES]]

    of_held_out = evaluate_reconstruction(pipe, held_out).values
    of_train = evaluate_reconstruction(pipe, train, extractor).values
    anchors = evaluate_tokens(pipe, held_out).summary()["anchors_by_layer"]
    probes = evaluate_linear_probe(tokenizer, data / "train", data / "validation", PROBE)
    num_samples = NUM_IMAGES // generator.config.num_classes * generator.config.num_classes
    settings = SamplingSettings(num_samples)
    samples = SampleFolder(variant / "samples", settings, generator.config.num_classes, model_fingerprint(pipe))
    draw_samples(pipe, samples)
    reference = Reference.of(extract_features(FolderImages(train, size), extractor))
    sample_distances, _ = compare_features(extract_features(samples, extractor), reference)
    return {
        "psnr": of_held_out["psnr"],
        "ssim": of_held_out["ssim"],
        "codebook_usage": of_held_out["codebook_usage"],
        "rfid": of_train["rfid"],
        "ris": of_train["ris"],
        "outside_cell": anchors["outside_cell"],
        "probe_mean_class_accuracy": {name: result.mean_class_accuracy for name, result in probes.items()},
        "probe_top1": {name: result.top1 for name, result in probes.items()},
        "generator_loss": log_of(variant / "generator", "validation", "loss")[1][-1],
        **{f"samples_{name}": value for name, value in sample_distances.items()},
    }


def convergence_figure(runs: Path, variants: list[str]) -> Figure:
    """PSNR of the tokenizers and validation loss of the generators over their steps."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    tokenizer, generator = figure.subplots(1, 2)
    for variant, colour in zip(variants, COLOURS, strict=False):
        label = variant.replace("_", " ")
        tokenizer.plot(*log_of(runs / variant / "tokenizer", "validation", "psnr"), color=colour, marker=".", label=label)
        generator.plot(*log_of(runs / variant / "generator", "validation", "loss"), color=colour, marker=".", label=label)
    tokenizer.set(xlabel="step", ylabel="PSNR (dB)", title="tokenizer, held-out images")
    generator.set(xlabel="step", ylabel="nats per token", title="next-token generator on its tokens, held-out images")
    tokenizer.legend(frameon=False)
    return figure


def probe_figure(measurements: dict[str, dict]) -> Figure:
    """Accuracy of the linear probes, mean over classes."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(next(iter(measurements.values()))["probe_mean_class_accuracy"])
    width = 0.8 / len(measurements)
    for number, ((variant, values), colour) in enumerate(zip(measurements.items(), COLOURS, strict=False)):
        places = [place + (number - (len(measurements) - 1) / 2) * width for place in range(len(names))]
        heights = [100 * values["probe_mean_class_accuracy"][name] for name in names]
        axes.bar(places, heights, width, color=colour, label=variant.replace("_", " "))
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(ylabel="accuracy, mean over classes (%)", ylim=(0, 100), title="linear probes, 214 held-out images")
    axes.legend(frameon=False, ncols=2)
    return figure


def print_table(measurements: dict[str, dict]) -> None:
    columns = {
        "PSNR (dB) ↑": lambda m: f"{m['psnr']:.2f}",
        "SSIM ↑": lambda m: f"{m['ssim']:.3f}",
        "usage ↑": lambda m: f"{m['codebook_usage']:.0%}",
        "rFD ↓": lambda m: f"{m['rfid']:.1f}",
        "probe, image_embeds ↑": lambda m: f"{m['probe_mean_class_accuracy']['image_embeds']:.1%}",
        "probe, tokens ↑": lambda m: f"{m['probe_mean_class_accuracy']['token_embeddings']:.1%}",
        "generator loss": lambda m: f"{m['generator_loss']:.3f}",
        "samples FD ↓": lambda m: f"{m['samples_fid']:.1f}",
        "precision ↑": lambda m: f"{m['samples_precision']:.3f}",
        "recall ↑": lambda m: f"{m['samples_recall']:.3f}",
    }
    print(f"| variant | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for variant, values in measurements.items():
        print(f"| {variant.replace('_', ' ')} | {' | '.join(cell(values) for cell in columns.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("runs", "data", "features", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    extractor = VisionModelFeatures(str(arguments.features), FEATURE_SIZE)
    file = arguments.runs / "measurements.json"
    measurements = json.loads(file.read_text()) if file.is_file() else {}
    for variant in VARIANTS:
        # The generator's log is the last thing that a variant's training writes.
        finished = (arguments.runs / variant / "generator" / "samples").is_dir()
        if finished and variant not in measurements:
            measurements[variant] = measure(arguments.runs / variant, arguments.data, extractor)
            file.write_text(json.dumps(measurements, indent=1))
    measurements = {variant: measurements[variant] for variant in VARIANTS if variant in measurements}
    save_figure(convergence_figure(arguments.runs, list(measurements)), arguments.output / "claims_convergence.png")
    save_figure(probe_figure(measurements), arguments.output / "claims_probes.png")
    print_table(measurements)


if __name__ == "__main__":
    main()
