"""The checkpoints released by the authors of VFMTok, and how to publish them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


Kind = Literal["tokenizer", "ar", "rar", "vfmae", "dit"]

ORIGINAL_REPOSITORY = "yexiguafu/VFMTok"
VISION_MODEL = "facebook/dinov2-with-registers-large"
TOKENIZER_NAME = "VFMTok-DINOv2-L"
AUTOENCODER_NAME = "VFMAE-DINOv2-L"


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """
    One file of the repository `yexiguafu/VFMTok`.

    Args:
        source: its path there.
        kind: kind of model.
        name: name of the repository to publish.
        num_parameters: parameters of the model, including a vision model.
        published_as: name in `evaluation/published.json`, which contains the authors' figures.
    """

    source: str
    kind: Kind
    name: str
    num_parameters: int
    published_as: str


RELEASED_CHECKPOINTS = (
    ReleasedCheckpoint(
        "DINOv2/tokenizer/vfmtok-tokenizer.pt",
        "tokenizer",
        TOKENIZER_NAME,
        377_659_567,
        "vfmtok-dinov2-l",
    ),
    ReleasedCheckpoint("DINOv2/GPT-B/GPT-B-300e.pt", "ar", "VFMTok-AR-B", 110_888_448, "vfmtok-b"),
    ReleasedCheckpoint("DINOv2/GPT-L/GPT-L-300e.pt", "ar", "VFMTok-AR-L", 342_910_976, "vfmtok-l"),
    ReleasedCheckpoint("DINOv2/GPT-XL/GPT-XL-200e.pt", "ar", "VFMTok-AR-XL", 774_699_520, "vfmtok-xl"),
    ReleasedCheckpoint("DINOv2/GPT-XXL/GPT-XXL-200e.pt", "ar", "VFMTok-AR-XXL", 1_410_972_672, "vfmtok-xxl"),
    ReleasedCheckpoint("DINOv2/GPT-2B/GPT-2B-200e.pt", "ar", "VFMTok-AR-2B", 2_188_389_120, "vfmtok-2b"),
    ReleasedCheckpoint("DINOv2/GPT-3B/GPT-3B-200e.pt", "ar", "VFMTok-AR-3B", 3_096_659_200, "vfmtok-3b"),
    ReleasedCheckpoint(
        "VFMTok-RAR/RAR-L-ultra/model.safetensors", "rar", "VFMTok-RAR-L-ultra", 493_140_992, "vfmtok-rar-l-ultra"
    ),
    ReleasedCheckpoint(
        "VFMTok-RAR/RAR-vanilla/vfmtok-rar-l.safetensors", "rar", "VFMTok-RAR-L", 493_140_992, "vfmtok-rar-l"
    ),
    ReleasedCheckpoint(
        "VFMTok-RAR/RAR-vanilla/vfmtok-rar-xl.safetensors", "rar", "VFMTok-RAR-XL", 910_843_136, "vfmtok-rar-xl"
    ),
    ReleasedCheckpoint(
        "VFMTok-RAR/RAR-vanilla/vfmtok-rar-xxl.safetensors", "rar", "VFMTok-RAR-XXL", 1_541_789_824, "vfmtok-rar-xxl"
    ),
    ReleasedCheckpoint("tokenizer/vfmae-tokenizer.pt", "vfmae", AUTOENCODER_NAME, 381_836_819, "vfmae-dinov2-l"),
    ReleasedCheckpoint("DiTDH-XL/DiTDH-XL_80e.pt", "dit", "VFMTok-DiT-XL-80e", 834_812_532, "ditdh-xl-80e"),
    ReleasedCheckpoint("DiTDH-XL/DiTDH-XL_800e.pt", "dit", "VFMTok-DiT-XL", 834_812_532, "ditdh-xl-800e"),
)


def find_released(checkpoint: str | Path) -> ReleasedCheckpoint | None:
    """The released checkpoint of a file, by the end of its path, such as `originals/DINOv2/GPT-B/GPT-B-300e.pt`."""
    path = Path(checkpoint).resolve().as_posix()
    return next((row for row in RELEASED_CHECKPOINTS if path.endswith(f"/{row.source}")), None)


def released_table() -> str:
    """The table in docs/hub.md: repository and size of each released file, and options of `vfmtok push`."""
    autoencoders = {row.kind: row for row in RELEASED_CHECKPOINTS if row.kind in ("tokenizer", "vfmae")}
    lines = ["| file | repository | float32 weights | options |", "|---|---|---|---|"]
    for row in RELEASED_CHECKPOINTS:
        num_parameters = row.num_parameters
        if row.kind in autoencoders:
            along = f"--vision-model {VISION_MODEL}"
            if row.kind == "vfmae":
                along += " --latent-statistics released"
        else:
            autoencoder = autoencoders["vfmae" if row.kind == "dit" else "tokenizer"]
            along = f"--tokenizer you/{autoencoder.name}"
            num_parameters += autoencoder.num_parameters
        size = f"{4 * num_parameters / 1e9:.1f} GB"
        lines.append(f"| `{row.source}` | `you/{row.name}` | {size} | `--convert {row.kind} {along}` |")
    return "\n".join(lines) + "\n"


__all__ = ["ORIGINAL_REPOSITORY", "RELEASED_CHECKPOINTS", "ReleasedCheckpoint", "find_released", "released_table"]
