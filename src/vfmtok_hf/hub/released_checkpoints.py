"""The checkpoints released by the authors of VFMTok, and how to publish them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


Kind = Literal["tokenizer", "ar", "rar"]

ORIGINAL_REPOSITORY = "yexiguafu/VFMTok"
VISION_MODEL = "facebook/dinov2-with-registers-large"
TOKENIZER_NAME = "VFMTok-DINOv2-L"


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """
    One file of the repository `yexiguafu/VFMTok`.

    Args:
        source: its path there.
        kind: of model; `None` if this package does not support it.
        name: name of the repository to publish.
        num_parameters: parameters of the model, including a tokenizer's vision model.
        published_as: name in `evaluation/published.json`, which contains the authors' figures.
    """

    source: str
    kind: Kind | None
    name: str
    num_parameters: int
    published_as: str | None


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
    ReleasedCheckpoint("tokenizer/vfmae-tokenizer.pt", None, "", 0, None),
    ReleasedCheckpoint("DiTDH-XL/DiTDH-XL_80e.pt", None, "", 0, None),
    ReleasedCheckpoint("DiTDH-XL/DiTDH-XL_800e.pt", None, "", 0, None),
)


def find_released(checkpoint: str | Path) -> ReleasedCheckpoint | None:
    """The released checkpoint of a file, by the end of its path, such as `originals/DINOv2/GPT-B/GPT-B-300e.pt`."""
    path = Path(checkpoint).resolve().as_posix()
    return next((row for row in RELEASED_CHECKPOINTS if path.endswith(f"/{row.source}")), None)


def released_table() -> str:
    """The table in docs/hub.md: repository and size of each released file, and options of `vfmtok push`."""
    tokenizer, *_ = RELEASED_CHECKPOINTS
    lines = ["| file | repository | float32 weights | options |", "|---|---|---|---|"]
    for row in RELEASED_CHECKPOINTS:
        if row.kind is None:
            lines.append(f"| `{row.source}` | — | | not supported |")
            continue
        along = f"--vision-model {VISION_MODEL}" if row is tokenizer else f"--tokenizer you/{TOKENIZER_NAME}"
        num_parameters = row.num_parameters + (0 if row is tokenizer else tokenizer.num_parameters)
        size = f"{4 * num_parameters / 1e9:.1f} GB"
        lines.append(f"| `{row.source}` | `you/{row.name}` | {size} | `--convert {row.kind} {along}` |")
    return "\n".join(lines) + "\n"


__all__ = ["ORIGINAL_REPOSITORY", "RELEASED_CHECKPOINTS", "ReleasedCheckpoint", "find_released", "released_table"]
