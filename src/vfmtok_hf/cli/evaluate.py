"""`vfmtok evaluate`: each command calls one function of `vfmtok_hf.evaluation` and prints its result."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from vfmtok_hf.cli.options import (
    MAX_SEED,
    BatchSizeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    check_sources,
    error_console,
    load_pipeline,
    one_line_errors,
    output_console,
    output_option,
    progress,
    quiet_libraries,
    report_written,
    resolve_model,
)


if TYPE_CHECKING:
    from vfmtok_hf.evaluation.features import FeatureExtractor
    from vfmtok_hf.evaluation.generation import GenerationResult, SampleFolder
    from vfmtok_hf.pipelines import VFMTokPipeline


evaluate_app = typer.Typer(help="Evaluate tokenizers and generators.", no_args_is_help=True)


ResizeMode = Literal["reconstruction", "generation"]
PicturesArgument = Annotated[
    list[str],
    typer.Argument(
        help="Image files and folders, or a data set: parquet, arrow, WebDataset `.tar`, or a repository with `--split`.",
        show_default=False,
    ),
]
SplitOption = Annotated[str | None, typer.Option(help="Split of a data set. *Default: `train`.*")]
ImageColumnOption = Annotated[str | None, typer.Option(help="Column of a data set. *Default: the one with images.*")]
StreamingOption = Annotated[bool, typer.Option("--streaming", help="Read a data set without storing it on disk.")]
FeaturesOption = Annotated[
    str,
    typer.Option(
        help="Network for FID and other distances: `inception`, a folder or repository of a vision model, `own` for the "
        "tokenizer's vision model, or for reconstruction `none`."
    ),
]
FeatureSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Input size in pixels of a vision model. *Default: its own.*")
]
InceptionWeightsOption = Annotated[
    Path | None, typer.Option(help="File with torch-fidelity's Inception weights. *Default: download.*")
]
ResultOption = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the result to.")]
DatasetOption = Annotated[str | None, typer.Option(help="Name of the data in tables. *Default: the path.*")]


def print_values(values: dict[str, float], features: str = "", remarks: Sequence[str] = ()) -> None:
    """Print a table. Metrics on features name their network, because values of different networks are not comparable."""
    from vfmtok_hf.evaluation.results import METRIC_NAMES, OF_FEATURES

    table = Table("metric", "value")
    table.columns[1].justify = "right"
    for name, value in values.items():
        label = METRIC_NAMES.get(name, name) + (f" ({features})" if name in OF_FEATURES else "")
        table.add_row(escape(label), f"{value:.4f}")
    output_console.print(table)
    for remark in remarks:
        error_console.print(f"Note: {remark}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def open_features(
    features: str, pipe: "VFMTokPipeline", size: int | None, inception_weights: Path | None
) -> "FeatureExtractor":
    """Create the feature network of `--features` and its options."""
    from vfmtok_hf.evaluation.features import load_feature_extractor

    source = features if features in ("inception", "own") else resolve_model(features)
    return load_feature_extractor(source, pipe.components.get("vq_model"), size, inception_weights, pipe.device)


@evaluate_app.command()
def reconstruction(
    images: PicturesArgument,
    split: SplitOption = None,
    image_column: ImageColumnOption = None,
    streaming: StreamingOption = False,
    features: FeaturesOption = "inception",
    feature_size: FeatureSizeOption = None,
    inception_weights: InceptionWeightsOption = None,
    lpips: Annotated[
        Literal["alex", "vgg", "squeeze"] | None, typer.Option(help="Network of LPIPS. *Default: no LPIPS.*")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Image size for the comparison; the paper uses 256. *Default: the model's.*"),
    ] = None,
    resize: Annotated[ResizeMode, typer.Option(help="How images are resized to that size.")] = "reconstruction",
    ssim: Annotated[
        Literal["original", "standard"],
        typer.Option(help="`original`: as in the original's script; `standard`: as published."),
    ] = "original",
    output: ResultOption = None,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """Measure rFID, rIS, PSNR, SSIM and LPIPS of a tokenizer or a continuous autoencoder, and the codebook usage of a tokenizer."""
    with one_line_errors("eval"):
        from vfmtok_hf.data.output_files import check_output_file

        if output is not None:
            check_output_file(output)
        check_sources(images, split)
        resolve_model(model)
        quiet_libraries()

        from vfmtok_hf.data.pictures import number_of, open_pictures
        from vfmtok_hf.evaluation.reconstruction import check_ssim_window, evaluate_reconstruction, load_lpips
        from vfmtok_hf.evaluation.results import save_measurement

        pictures = open_pictures(images, split, image_column, streaming)
        pipe = load_pipeline(model, device, dtype, encodes=True, reconstructs=True)
        check_ssim_window(size or pipe.autoencoder.config.image_size, ssim)
        extractor = None
        if features != "none":
            extractor = open_features(features, pipe, feature_size, inception_weights)
        distance = load_lpips(lpips, pipe.device) if lpips is not None else None
        with progress("Reconstructing", number_of(pictures)) as progress_callback:
            result = evaluate_reconstruction(
                pipe, pictures, extractor, distance, size, resize, ssim, batch_size, progress_callback
            )
        print_values(result.values, result.protocol["features"], result.remarks)
        if output is not None:
            setting = f"{pipe.autoencoder.config.image_size} -> {result.protocol['size']}"
            name = dataset or ", ".join(images)
            save_measurement(
                output,
                "reconstruction",
                setting,
                name,
                result.values,
                result.protocol,
                num_images=result.num_images,
                remarks=result.remarks,
            )
            report_written(1, "measurement", output)


@evaluate_app.command()
def generation(
    reference: Annotated[
        Path, typer.Option(help="Real images: a folder, or one of ADM's `.npz` files, with or without statistics.")
    ],
    output: Annotated[
        Path,
        output_option("Folder for samples and results. An interrupted run resumes there."),
    ],
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=2)] = 50_000,
    guidance_scale: Annotated[
        list[float] | None,
        typer.Option("--guidance-scale", "-g", help="Guidance scale; repeat it for a sweep. *Default: 1 (off).*"),
    ] = None,
    guidance_scale_pow: Annotated[
        float | None, typer.Option(help="Power of the guidance schedule, for RAR generators.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature. *Default: the checkpoint's.*")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k most probable tokens; 0 is off. *Default: the checkpoint's.*")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the most probable tokens up to this sum; 1 is off. *Default: the checkpoint's.*"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Sample i uses seed + i.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Size of samples and reference; the paper uses 256. *Default: the model's.*"),
    ] = None,
    resize: Annotated[ResizeMode, typer.Option(help="How samples are resized to that size.")] = "generation",
    npz: Annotated[bool, typer.Option("--npz", help="Also write the samples in the format of ADM's suite.")] = False,
    features: FeaturesOption = "inception",
    feature_size: FeatureSizeOption = None,
    inception_weights: InceptionWeightsOption = None,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples that are generated at once and stored in one file.")
    ] = 64,
) -> None:
    """
    Measure FID, sFID, IS, precision and recall of a generator, on class-balanced samples.

    Several processes share the work: `accelerate launch -m vfmtok_hf evaluate generation ...`
    """
    with one_line_errors("eval"):
        from vfmtok_hf.data.output_files import check_output_folder

        if features == "none":
            raise ValueError("Samples are compared by features: choose a network with --features.")
        check_output_folder(output)
        resolve_model(model)
        quiet_libraries()

        from accelerate import PartialState

        from vfmtok_hf.cli.environment import default_device
        from vfmtok_hf.data.image_sets import FolderImages
        from vfmtok_hf.evaluation.generation import (
            SampleFolder,
            SampleFolderSettings,
            check_sampling,
            load_reference,
            model_fingerprint,
        )
        from vfmtok_hf.evaluation.metrics import check_enough_images

        # By default, accelerate does not connect CPU processes.
        state = PartialState(cpu=str(device or default_device()) == "cpu")
        pipe = load_pipeline(model, device or str(state.device), dtype, generates=True, encodes=features == "own")
        size = size or pipe.vq_model.config.image_size
        scales = sorted(set(guidance_scale or [1.0]))
        settings = [
            SampleFolderSettings(
                num_samples,
                seed,
                scale,
                guidance_scale_pow,
                temperature,
                top_k,
                top_p,
                size,
                resize,
                chunk_size=batch_size,
            )
            for scale in scales
        ]
        # Check settings, reference and features before hours of sampling.
        for setting in settings:
            check_sampling(pipe, setting)
        fingerprint, num_classes = model_fingerprint(pipe), pipe.transformer.config.num_classes
        with state.main_process_first():
            folders = [
                SampleFolder(output / f"guidance_{setting.guidance_scale:g}", setting, num_classes, fingerprint)
                for setting in settings
            ]
        if state.is_main_process:
            source = reference if reference.suffix == ".npz" else FolderImages([reference], size)
            extractor = open_features(features, pipe, feature_size, inception_weights)
            with progress("Reference", len(source) if isinstance(source, FolderImages) else None) as progress_callback:
                real = load_reference(source, extractor, size, batch_size, progress_callback)
            check_enough_images(num_samples, real, extractor.classifies)
        state.wait_for_everyone()
        for samples in folders:
            generate_missing(pipe, samples, state.process_index, state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            results = [
                measure_samples(samples, real, extractor, dataset or str(reference), npz, batch_size)
                for samples in folders
            ]
            if len(scales) > 1:
                write_sweep(scales, results, output)
            report_written(num_samples * len(scales), "sample", output)


def generate_missing(pipe: "VFMTokPipeline", samples: "SampleFolder", process_index: int, num_processes: int) -> None:
    """Generate this process's share of the missing samples, with a progress bar on the first process."""
    from vfmtok_hf.evaluation.generation import generate_samples

    total = sum(len(samples.chunks[chunk]) for chunk in samples.missing(process_index, num_processes))
    with progress(f"Generating {Path(samples.name).name}", total) as progress_callback:
        generate_samples(
            pipe,
            samples,
            process_index,
            num_processes,
            progress_callback if process_index == 0 else lambda count: None,
        )


def measure_samples(
    samples: "SampleFolder", real, extractor, dataset: str, npz: bool, batch_size: int
) -> "GenerationResult":
    """Evaluate one folder of samples, print and write the result."""
    from vfmtok_hf.evaluation.generation import evaluate_generation, write_samples_npz
    from vfmtok_hf.evaluation.results import save_measurement

    if npz:
        write_samples_npz(samples, samples.folder / "samples.npz")
    with progress("Features", len(samples)) as progress_callback:
        result = evaluate_generation(samples, real, extractor, vars(samples.settings), batch_size, progress_callback)
    scale = samples.settings.guidance_scale
    output_console.print(f"guidance scale {scale:g}", markup=False, highlight=False)
    print_values(result.values, result.protocol["features"], result.remarks)
    save_measurement(
        samples.folder / "results.json",
        "generation",
        "without guidance" if scale <= 1 else "with guidance",
        dataset,
        result.values,
        result.protocol,
        num_images=result.num_samples,
        remarks=result.remarks,
    )
    return result


def write_sweep(scales: list[float], results: list["GenerationResult"], output: Path) -> None:
    """Write the curve over all scales as a figure and as CSV."""
    import csv

    from vfmtok_hf.data.output_files import whole_file
    from vfmtok_hf.plotting import plot_guidance, save_figure

    values = [result.values for result in results]
    save_figure(plot_guidance(scales, values, results[0].protocol["features"]), output / "guidance.png")
    with whole_file(output / "guidance.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["guidance_scale", *values[0]])
        writer.writeheader()
        writer.writerows({"guidance_scale": scale, **point} for scale, point in zip(scales, values, strict=True))


@evaluate_app.command("linear-probe")
def linear_probe(
    train: Annotated[
        str,
        typer.Option(
            help="Training data: a folder of `class_name/image.png`, or a data set: parquet, arrow, WebDataset `.tar`, or a "
            "repository with `--train-split`."
        ),
    ],
    test: Annotated[str, typer.Option(help="Test data, as for --train.")],
    train_split: Annotated[str | None, typer.Option(help="Split of a data set. *Default: `train`.*")] = None,
    test_split: Annotated[str | None, typer.Option(help="Split of a data set. *Default: `test`.*")] = None,
    image_column: ImageColumnOption = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of a data set. *Default: the one with classes.*")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 90,
    views: Annotated[int, typer.Option(min=1, help="Augmentations of each training image.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    output: ResultOption = None,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 32,
) -> None:
    """Train linear probes on the tokenizer's embedding, its tokens, its vision model, and raw pixels."""
    with one_line_errors("eval"):
        from vfmtok_hf.data.output_files import check_output_file

        if output is not None:
            check_output_file(output)
        resolve_model(model)
        quiet_libraries()

        from vfmtok_hf.evaluation.linear_probe import LabeledImages, ProbeSettings, represent_data, train_probes
        from vfmtok_hf.evaluation.results import save_measurement

        train_images = LabeledImages.open(train, train_split or "train", image_column, label_column)
        test_images = LabeledImages.open(test, test_split or "test", image_column, label_column)
        pipe = load_pipeline(model, device, dtype, encodes=True)
        settings = ProbeSettings(epochs=epochs, warmup_epochs=min(10, epochs // 2), views=views, seed=seed)
        with progress("Encoding", views * len(train_images) + len(test_images)) as progress_callback:
            data = represent_data(pipe.vq_model, train_images, test_images, views, batch_size, progress_callback)
        with progress("Training", len(data.train)) as progress_callback:
            results = train_probes(data, settings, progress_callback)
        table = Table("representation", "channels", "top-1", "mean over classes")
        for name, result in results.items():
            table.add_row(name, str(result.channels), f"{result.top1:.1%}", f"{result.mean_class_accuracy:.1%}")
        output_console.print(table)
        if output is not None:
            for name, result in results.items():
                values = {"top1": result.top1, "mean_class_accuracy": result.mean_class_accuracy}
                file = output.with_name(f"{output.stem}_{name}{output.suffix}")
                protocol = {"epochs": epochs, "views": views, "base_learning_rate": result.base_learning_rate}
                save_measurement(
                    file,
                    "linear_probe",
                    name,
                    dataset or test,
                    values,
                    protocol,
                    num_images=len(test_images),
                )
            report_written(len(results), "measurement", output.parent)


@evaluate_app.command()
def tokens(
    images: PicturesArgument,
    split: SplitOption = None,
    image_column: ImageColumnOption = None,
    streaming: StreamingOption = False,
    output: Annotated[Path, output_option("Folder for the figures.")] = Path("tokens"),
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    batch_size: BatchSizeOption = 16,
) -> None:
    """Measure codebook usage, and plot where in the images the anchors look."""
    with one_line_errors("eval"):
        import json
        from itertools import islice

        from vfmtok_hf.data.output_files import check_output_folder, whole_file

        check_output_folder(output)
        check_sources(images, split)
        resolve_model(model)
        quiet_libraries()

        from vfmtok_hf.data.pictures import number_of, open_pictures
        from vfmtok_hf.evaluation.tokens import anchor_attention, evaluate_tokens, token_count_remarks
        from vfmtok_hf.plotting import (
            plot_anchor_statistics,
            plot_codebook_usage,
            plot_sampling_locations,
            save_figure,
        )

        pictures = open_pictures(images, split, image_column, streaming)
        pipe = load_pipeline(model, device, dtype, encodes=True)
        with progress("Encoding", number_of(pictures)) as progress_callback:
            result = evaluate_tokens(pipe, pictures, batch_size, progress_callback)
        summary = result.summary()
        with whole_file(output / "tokens.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        step = max(result.num_images // 4, 1)
        examples = list(islice(pictures, 0, 4 * step, step))
        side = pipe.vq_model.config.anchor_grid_size
        # The corners and the center of the inner half of the grid.
        near, middle, far = side // 4, side // 2, side - 1 - side // 4
        places = [(near, near), (near, far), (middle, middle), (far, near), (far, far)]
        anchors = [row * side + column for row, column in places]
        save_figure(plot_codebook_usage(result), output / "codebook.png")
        save_figure(plot_anchor_statistics(result), output / "anchors.png")
        attention = anchor_attention(pipe, examples)
        locations = attention.images, attention.sampling_locations, attention.attention_weights
        save_figure(plot_sampling_locations(*locations, anchors), output / "sampling.png")
        table = Table("layer", *summary["anchors_by_layer"])
        for layer, row in enumerate(zip(*summary["anchors_by_layer"].values(), strict=True), start=1):
            table.add_row(str(layer), *(f"{value:.3f}" for value in row))
        output_console.print(table)
        print_values(
            {"codebook_usage": result.codebook.usage, "codebook_perplexity": result.codebook.perplexity},
            remarks=token_count_remarks(result.token_counts),
        )
        report_written(3, "figure", output)
