"""
Compare all three models on a device with the numbers of the original code (tests/fixtures/reference).

    PYTHONPATH=src:. python benchmarks/golden.py --device cuda

float32, without TF32, must stay within the bounds of the reference tests and give equal tokens. The bounds for bfloat16 are two
to seven times the differences on a CPU. In bfloat16, rounding can change the larger of two close logits, after which greedy
sequences differ; the share of equal tokens is reported. The exit code is 1 if anything is out of bounds.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import machine, name_of
from result_tables import show_table

from tests.modeling.generators import Recorder
from tests.testing import (
    REFERENCE,
    REFERENCE_AR_CONFIG,
    REFERENCE_TOKENIZER_CONFIG,
    reference_images,
    reference_tensors,
)
from vfmtok_hf import VFMTokARForImageGeneration, VFMTokModel, VFMTokRARForImageGeneration
from vfmtok_hf.conversion import convert_ar, convert_rar, convert_tokenizer


# A quantity, what the device computed, what the original computed.
Comparison = tuple[str, torch.Tensor, torch.Tensor]
BOUNDS = {
    torch.float32: {"latents": 5e-5, "losses": 5e-5, "reconstruction": 1e-3, "logits": 1e-4, "guided logits": 5e-4},
    torch.bfloat16: {"latents": 0.25, "losses": 1e-3, "reconstruction": 0.25, "logits": 0.5},
}


@torch.no_grad()
def compare_tokenizer(dtype: torch.dtype, device: str, folder: Path) -> Iterator[Comparison]:
    expected = reference_tensors("tokenizer")
    images = reference_images("b336_0", "b336_1").to(device)
    models = {}
    for weights in ("ema", "model"):
        convert_tokenizer(
            REFERENCE / "tokenizer" / "tokenizer.pt",
            folder / weights,
            vision_checkpoint=REFERENCE / "tokenizer" / "backbone.pt",
            weights=weights,
            config=REFERENCE_TOKENIZER_CONFIG,
        )
        models[weights] = VFMTokModel.from_pretrained(folder / weights, dtype=dtype).to(device)
    model = models["ema"].eval()
    encoded = model.encode(images)
    yield "latents", encoded.latents, expected["b336.prequant"]
    yield "image tokens", encoded.image_tokens, expected["b336.indices"]
    decoded = model.decode(image_tokens=expected["b336.indices"].to(device))
    yield "reconstruction", decoded.reconstruction[:, :, ::5, ::5], expected["b336.recon.stride5"]
    trained = models["model"].train()(images, return_loss=True)
    losses = torch.stack([trained.codebook_loss, trained.commitment_loss, trained.feature_loss])
    names = ("train.vq_loss", "train.commit_loss", "train.cosine_loss")
    yield "losses", losses, torch.cat([expected[name] for name in names])


def compare_ar(dtype: torch.dtype, device: str, folder: Path) -> Iterator[Comparison]:
    convert_ar(REFERENCE / "gpt" / "gpt.pt", folder / "ar", weights="ema", config=REFERENCE_AR_CONFIG)
    model = VFMTokARForImageGeneration.from_pretrained(folder / "ar", dtype=dtype).eval().to(device)
    expected = reference_tensors("gpt")
    return compare_generator(model, expected, expected["eval.ema.logits"], "cfg1.0", "cfg4.0")


def compare_rar(dtype: torch.dtype, device: str, folder: Path) -> Iterator[Comparison]:
    convert_rar(REFERENCE / "rar" / "model.safetensors", folder / "rar")
    model = VFMTokRARForImageGeneration.from_pretrained(folder / "rar", dtype=dtype).eval().to(device)
    expected = reference_tensors("rar")
    return compare_generator(model, expected, expected["train.raster.logits"], "guidance0", "guidance4.0_pow1.0")


@torch.no_grad()
def compare_generator(
    model: VFMTokARForImageGeneration | VFMTokRARForImageGeneration,
    expected: dict[str, torch.Tensor],
    expected_logits: torch.Tensor,
    plain: str,
    guided: str,
) -> Iterator[Comparison]:
    """`plain` and `guided` name the reference's greedy sequences without guidance and with a scale of 4."""
    labels = expected["labels"].to(model.device)
    logits = model(labels, expected["token_ids"].to(model.device)).logits
    yield "logits", logits, expected_logits[:, :-1]
    yield "greedy tokens", model.generate(labels, do_sample=False), expected[f"gen.{plain}.tokens"]
    recorder = Recorder()
    tokens = model.generate(labels, do_sample=False, guidance_scale=4.0, logits_processor=recorder)
    yield "greedy tokens, guided", tokens, expected[f"gen.{guided}.tokens"]
    if model.dtype == torch.float32:  # in bfloat16 the sequences diverge, and their logits are not comparable
        yield "guided logits", recorder.step_logits, expected[f"gen.{guided}.step_logits"]
    torch._dynamo.reset()  # what other models compiled counts against the limit of a function's graphs
    model.compile_decoding()
    yield "greedy tokens, compiled", model.generate(labels, do_sample=False), expected[f"gen.{plain}.tokens"]


COMPARISONS = {"tokenizer": compare_tokenizer, "AR": compare_ar, "RAR": compare_rar}


def compare(name: str, dtype: torch.dtype, device: str) -> list[dict[str, object]]:
    """Rows of a table; the column `within` is "no" where a bound is missed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for quantity, actual, expected in COMPARISONS[name](dtype, device, Path(folder)):
            actual, bound = actual.cpu(), BOUNDS[dtype].get(quantity)
            if "tokens" in quantity:
                difference = (actual != expected).float().mean().item()
                shown, bound = f"{1 - difference:.1%} equal", 0.0 if dtype == torch.float32 else None
            else:
                difference = (actual.double() - expected).abs().max().item()
                shown = f"{difference:.1e}"
            rows.append(
                {
                    "model": name,
                    "dtype": name_of(dtype),
                    "side": quantity,
                    "difference": shown,
                    "bound": "" if bound is None else f"{bound:g}",
                    "within": "" if bound is None else "yes" if difference <= bound else "no",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", choices=COMPARISONS, nargs="+", default=list(COMPARISONS))
    arguments = parser.parse_args()
    print(machine(arguments.device))
    torch.backends.cudnn.allow_tf32 = False  # for matrix multiplications it is off by default
    missed = []
    for name in arguments.models:
        for dtype in BOUNDS:
            rows = compare(name, dtype, arguments.device)
            show_table("golden", rows)
            missed += [f"{name}, {row['dtype']}: {row['side']}" for row in rows if row["within"] == "no"]
    if missed:
        sys.exit(f"Out of bounds: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
