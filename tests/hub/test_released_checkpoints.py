"""The released checkpoints."""

import json
from pathlib import Path

from tests.testing import REFERENCE
from vfmtok_hf.hub.released_checkpoints import RELEASED_CHECKPOINTS, released_table


def test_the_table_of_the_documentation_is_up_to_date():
    assert released_table() in Path(__file__).parents[2].joinpath("docs", "hub.md").read_text(encoding="utf-8")


def test_the_table_covers_every_released_file():
    rows = released_table().splitlines()[2:]
    assert len(rows) == len(RELEASED_CHECKPOINTS) == 14
    assert "| `you/VFMTok-DINOv2-L` | 1.5 GB | `--convert tokenizer --vision-model facebook/" in rows[0]
    assert "| `you/VFMTok-RAR-XXL` | 7.7 GB | `--convert rar --tokenizer you/VFMTok-DINOv2-L` |" in rows[10]
    vision_model = "facebook/dinov2-with-registers-large"
    options = f"`--convert vfmae --vision-model {vision_model} --latent-statistics released`"
    assert f"| `you/VFMAE-DINOv2-L` | 1.5 GB | {options} |" in rows[11]
    assert "| `you/VFMTok-DiT-XL` | 4.9 GB | `--convert dit --tokenizer you/VFMAE-DINOv2-L` |" in rows[13]


def test_sizes_are_those_of_the_models():
    counts = json.loads((REFERENCE / "manifests" / "parameter_counts.json").read_text())
    names = {
        "VFMTok-DINOv2-L": "tokenizer_vq16",
        "VFMTok-RAR-L-ultra": "RAR-L",
        "VFMAE-DINOv2-L": "VFMAE",
        "VFMTok-DiT-XL-80e": "DiTDH-XL",
        "VFMTok-DiT-XL": "DiTDH-XL",
    }
    for row in RELEASED_CHECKPOINTS:
        name = names.get(row.name) or row.name.replace("VFMTok-AR-", "GPT-").replace("VFMTok-", "")
        assert row.num_parameters == counts[name]["total"], row.name
