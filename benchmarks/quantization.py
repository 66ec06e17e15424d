"""
Weight-only quantization of generators: speed and size at the released sizes, and the loss of quality.

    python benchmarks/quantization.py speed --model AR-B --batch-sizes 1 8
    python benchmarks/quantization.py quality --validation FOLDER

`speed` runs random weights of a released size. Its reference is the plain float32 model. `quality` runs the checkpoint of this
package and compares it with float32: validation loss on a folder of images (`<class>/*.png`, classes in sorted order), the
share of equal greedy tokens, and for samples of the same seeds the share of equal tokens and the Frechet distance to the
validation images in the vision model's features. Needs vfmtok-hf[quantization,pipeline,eval].
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from decode import draw
from measuring import machine, median_seconds, usable_dtypes
from random_models import Generator, generator_config, random_generator
from result_tables import show_table
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModel, TorchAoConfig
from transformers.image_utils import load_image

from vfmtok_hf import DEFAULT_CHECKPOINT
from vfmtok_hf.cpu.packing import pack_weights
from vfmtok_hf.cpu.quantization import PackedQuantizedLinear
from vfmtok_hf.evaluation.features import OwnVisionFeatures
from vfmtok_hf.evaluation.metrics import FeatureStatistics, frechet_distance
from vfmtok_hf.pipelines import VFMTokPipeline


QUANTIZATIONS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def usable(sides: list[str]) -> list[str]:
    """Those that this machine supports."""
    return [side for side in sides if "bfloat16" not in side or torch.bfloat16 in usable_dtypes("cpu")]


def load_side(folder: str | Path, side: str) -> Generator:
    """The generator in `folder` as `side` says: "KIND", or "KIND, packed"; KIND is a dtype or a quantization of float32."""
    kind, _, packed = side.partition(", ")
    model = AutoModel.from_pretrained(
        folder,
        dtype=torch.float32 if kind in QUANTIZATIONS else getattr(torch, kind),
        quantization_config=TorchAoConfig(QUANTIZATIONS[kind]) if kind in QUANTIZATIONS else None,
    )
    return pack_weights(model) if packed else model


# ---------------------------------------------------------------------------------------------------------------
# Size


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a torchao tensor consists of. Other tensors are returned as they are."""
    names = [*getattr(tensor, "tensor_data_names", ()), *getattr(tensor, "optional_tensor_data_names", ())]
    parts = [getattr(tensor, name) for name in names] if names else [tensor]
    yield from (part for part in parts if part is not None)


def bytes_in_memory(model: Generator) -> int:
    """Bytes of all weights, scales included."""
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, PackedQuantizedLinear)}
    tensors = [tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in quantized]
    for module in quantized.values():
        tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return sum(part.numel() * part.element_size() for tensor in tensors for part in plain_tensors(tensor))


def bytes_on_disk(model: Generator) -> int:
    """Bytes of the files of weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------
# Speed


def measure_speed(arguments: argparse.Namespace) -> None:
    names = usable(["float32", "float32, packed", "bfloat16, packed", "int8", "int8, packed", "int4, packed"])
    with tempfile.TemporaryDirectory() as folder:
        random_generator(generator_config(arguments.model)).save_pretrained(folder)
        sides = {name: load_side(folder, name) for name in names}
    sizes = {
        name: {
            "MB in memory": f"{bytes_in_memory(model) / 1e6:.0f}",
            "MB on disk": f"{bytes_on_disk(model) / 1e6:.0f}",
        }
        for name, model in sides.items()
    }
    for batch_size in arguments.batch_sizes:
        labels = torch.arange(batch_size)
        calls = {name: partial(draw, model, labels, arguments.steps, 1.0) for name, model in sides.items()}
        seconds = median_seconds(calls, arguments.runs)
        table = [
            {
                "model": arguments.model,
                "threads": torch.get_num_threads(),
                "batch": batch_size,
                "side": name,
                "tokens/s": f"{batch_size * arguments.steps / time:.1f}",
                "times float32": f"{seconds['float32'] / time:.2f}",
                "times float32, packed": f"{seconds['float32, packed'] / time:.2f}",
                **sizes[name],
            }
            for name, time in seconds.items()
        ]
        show_table("quantization_speed", table)


# ---------------------------------------------------------------------------------------------------------------
# Quality


def validation_tokens(pipe: VFMTokPipeline, folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixel values `(n, 3, size, size)` of `folder`'s images, their classes `(n,)`, their image tokens."""
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, label) for label, path in enumerate(class_folders) for file in sorted(path.glob("*.png"))]
    pixel_values = pipe.image_processor([load_image(str(file)) for file, _ in files], return_tensors="pt")[
        "pixel_values"
    ]
    image_tokens = torch.cat([pipe.vq_model.encode(batch).image_tokens for batch in pixel_values.split(32)])
    return pixel_values, torch.tensor([label for _, label in files]), image_tokens


def pooled_features(pipe: VFMTokPipeline, pixel_values: torch.Tensor) -> FeatureStatistics:
    bytes_of_images = ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    extract = OwnVisionFeatures(pipe.vq_model)
    return FeatureStatistics.of(torch.cat([extract(batch).pooled for batch in bytes_of_images.split(32)]))


def equal_share(tokens: torch.Tensor, others: torch.Tensor) -> str:
    return f"{(tokens == others).float().mean():.1%}"


@torch.no_grad()
def measure_quality(arguments: argparse.Namespace) -> None:
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT, transformer=None)
    pixel_values, labels, image_tokens = validation_tokens(pipe, arguments.validation)
    reference = pooled_features(pipe, pixel_values)
    table, float32 = [], {}
    for name in usable(["float32", "bfloat16, packed", "int8, packed", "int4, packed"]):
        model = load_side(Path(DEFAULT_CHECKPOINT) / "transformer", name)
        scored = [
            model(*batch, return_loss=True) for batch in zip(labels.split(32), image_tokens.split(32), strict=True)
        ]
        sizes = torch.tensor([len(output.logits) for output in scored])
        classes = torch.arange(model.config.num_classes)
        generators = [torch.Generator().manual_seed(seed) for seed in range(arguments.samples)]
        drawn = model.generate(torch.arange(arguments.samples) % len(classes), generator=generators)
        pictures = torch.cat([pipe.vq_model.decode(image_tokens=rows).reconstruction for rows in drawn.split(32)])
        measured = {
            "loss": float((torch.stack([output.loss for output in scored]) * sizes).sum() / sizes.sum()),
            "best": torch.cat([output.logits.argmax(-1) for output in scored]),
            "greedy": model.generate(classes, do_sample=False),
            "drawn": drawn,
        }
        float32 = float32 or measured
        table.append(
            {
                "checkpoint": "emoji",
                "side": name,
                "validation loss": f"{measured['loss']:.4f}",
                "change": f"{measured['loss'] - float32['loss']:+.4f}",
                "equal best next tokens": equal_share(measured["best"], float32["best"]),
                "equal greedy tokens": equal_share(measured["greedy"], float32["greedy"]),
                "equal sampled tokens": equal_share(drawn, float32["drawn"]),
                "feature distance": f"{frechet_distance(pooled_features(pipe, pictures), reference):.3f}",
                "MB in memory": f"{bytes_in_memory(model) / 1e6:.1f}",
                "MB on disk": f"{bytes_on_disk(model) / 1e6:.1f}",
            }
        )
    show_table("quantization_quality", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    commands = parser.add_subparsers(required=True)
    speed = commands.add_parser("speed")
    speed.set_defaults(measure=measure_speed)
    speed.add_argument("--model", default="AR-B", help="AR-B, RAR-L, ...")
    speed.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    speed.add_argument("--steps", type=int, default=64, help="tokens per image; a whole image has 256")
    speed.add_argument("--runs", type=int, default=3)
    quality = commands.add_parser("quality")
    quality.set_defaults(measure=measure_quality)
    quality.add_argument(
        "--validation", type=Path, required=True, help="folder of CLASS/*.png, classes in sorted order"
    )
    quality.add_argument("--samples", type=int, default=448, help="images to generate, with classes in turn")
    for command in (speed, quality):
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine())
    arguments.measure(arguments)


if __name__ == "__main__":
    main()
