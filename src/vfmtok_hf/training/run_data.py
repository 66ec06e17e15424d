"""Check that a resumed run uses the same data: images, classes, and the held-out part."""

import json
from pathlib import Path
from typing import Any

from vfmtok_hf.data.fingerprints import json_sha256
from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.data.sources import ImageRecords
from vfmtok_hf.data.streams import Stream
from vfmtok_hf.training.arguments import TrainingArguments
from vfmtok_hf.training.logs import logger
from vfmtok_hf.training.scripts import finished_checkpoints


DATA_FILE = "data.json"


def check_data(
    arguments: TrainingArguments, train: Any, validation: Any, is_main_process: bool, classes_may_change: bool
) -> None:
    """
    Record the data of a new run in its folder, and compare the data of a resumed run with the record.

    Args:
        train, validation: [`ImageRecords`], [`Stream`] or a token set.
        classes_may_change (`bool`): True if the model does not depend on the classes.

    Raises:
        ValueError: the data differ, and `accept_changed_data` is false or classes may not change. The error names the difference.
    """
    output = Path(arguments.output)
    file = output / DATA_FILE
    now = {"training": identity_of(train), "validation": identity_of(validation)}
    if finished_checkpoints(output) and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        other_classes = before["training"]["classes"] != now["training"]["classes"]
        differences = [text for part in now for text in _differences(part, before[part], now[part])]
        if differences and (not arguments.accept_changed_data or (other_classes and not classes_may_change)):
            raise ValueError(_refusal(output, differences, other_classes and not classes_may_change))
        if differences:
            logger.warning("the data differ from those at the start of the run: %s", "; ".join(differences))
    if is_main_process:
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(now, indent=1), encoding="utf-8")


def identity_of(data: Any) -> dict[str, Any]:
    """Number of images, class names, and a checksum of the rest. None of them changes when the data move."""
    if isinstance(data, Stream):
        return {"images": data.epoch_items, "classes": data.class_names, "sha256": None}
    content: list[Any] = [data.labels]
    if isinstance(data, ImageRecords):
        # The fingerprint of files consists of names and sizes; the library's fingerprint changes with the location.
        content += [data.fingerprint] if isinstance(data.images, list) else [data.rows]
    return {"images": len(data), "classes": data.class_names, "sha256": json_sha256(content)}


def _differences(part: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    if before["images"] != now["images"]:
        found.append(f"{before['images']} -> {now['images']} {part} images")
    for verb, one, other in (("new", now, before), ("missing", before, now)):
        if names := [name for name in one["classes"] if name not in other["classes"]]:
            found.append(f"{verb} {part} classes: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
    if not found and before["classes"] != now["classes"]:
        found.append(f"{part} classes in another order")
    if not found and before["sha256"] != now["sha256"]:
        found.append(f"other names, sizes or labels among the {now['images']} {part} images")
    return found


def _refusal(output: Path, differences: list[str], by_classes: bool) -> str:
    cure = "Restore them, or start a new run with another --output and --init_from"
    if not by_classes:
        cure += "; --accept_changed_data continues with the changed data"
    return f"The data differ from those at the start of the run in {output}: {'; '.join(differences)}. {cure}."
