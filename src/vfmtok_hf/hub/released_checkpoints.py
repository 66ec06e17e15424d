"""The checkpoints that the authors of VFMTok have released, and what publishing each of them takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from vfmtok_hf.modeling.loading_vfmtok import one_line_errors


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
        kind: what it holds; `None` for models that this package does not have.
        name: of the repository to publish it as.
        num_parameters: of that model, a tokenizer's vision model included.
        published_as: its name in `evaluation/published.json`, which has the figures that its authors report.
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
    """The released checkpoint that a file is by the end of its path, such as `originals/DINOv2/GPT-B/GPT-B-300e.pt`."""
    path = Path(checkpoint).resolve().as_posix()
    return next((row for row in RELEASED_CHECKPOINTS if path.endswith(f"/{row.source}")), None)


@dataclass(frozen=True)
class PlannedRepository:
    """
    What publishing one released checkpoint takes.

    Args:
        source: path in the original's repository.
        source_bytes: size of that file as the Hub gives it; `None` if it was not asked, or does not have the file.
        target: repository to publish as; `None` for models that this package does not have.
        target_bytes: size of the weights there, in float32.
        commands: what to type.
    """

    source: str
    source_bytes: int | None
    target: str | None
    target_bytes: int
    commands: tuple[str, ...]


def publish_plan(namespace: str, ask_hub: bool = False) -> list[PlannedRepository]:
    """
    What publishing all released checkpoints takes, in the order to do it: the tokenizer first, which is published
    along with every generator.

    Args:
        namespace: user or organization to publish under.
        ask_hub: ask the Hub for the sizes of the originals.

    Raises:
        OSError: the Hub cannot be asked.
    """
    sizes: dict[str, int] = {}
    if ask_hub:
        sources = [row.source for row in RELEASED_CHECKPOINTS]
        with one_line_errors(ORIGINAL_REPOSITORY):
            found = HfApi().get_paths_info(ORIGINAL_REPOSITORY, sources)
        sizes = {info.path: info.size for info in found if isinstance(info, RepoFile)}
    return [_plan(row, namespace, sizes.get(row.source)) for row in RELEASED_CHECKPOINTS]


def _plan(row: ReleasedCheckpoint, namespace: str, source_bytes: int | None) -> PlannedRepository:
    if row.kind is None:
        return PlannedRepository(row.source, source_bytes, None, 0, ())
    tokenizer, target = f"{namespace}/{TOKENIZER_NAME}", f"{namespace}/{row.name}"
    is_tokenizer = row.kind == "tokenizer"
    along = f"--vision-model {VISION_MODEL}" if is_tokenizer else f"--tokenizer {tokenizer}"
    commands = (
        f"hf download {ORIGINAL_REPOSITORY} {row.source} --local-dir originals",
        f"vfmtok push originals/{row.source} {target} --convert {row.kind} {along}",
    )
    num_parameters = row.num_parameters + (0 if is_tokenizer else RELEASED_CHECKPOINTS[0].num_parameters)
    return PlannedRepository(row.source, source_bytes, target, 4 * num_parameters, commands)


__all__ = [
    "ORIGINAL_REPOSITORY",
    "RELEASED_CHECKPOINTS",
    "PlannedRepository",
    "ReleasedCheckpoint",
    "find_released",
    "publish_plan",
]
