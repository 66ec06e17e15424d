"""The same 24 images, three of them damaged, in every form that training reads."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image


NUM_IMAGES = 24
DAMAGED = {3, 4, 7}


def picture(number: int) -> Image.Image:
    """Noise around a gray that tells the number."""
    noise = np.random.default_rng(number).integers(-5, 6, (20, 24, 3))
    return Image.fromarray((10 * number + 8 + noise).clip(0, 255).astype(np.uint8))


def number_of(pixel_values: torch.Tensor) -> int:
    """The number that the pixel values of a picture tell."""
    return round((((pixel_values.mean() + 1) * 127.5).item() - 8) / 10)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_folder(root: Path) -> Path:
    """Two classes of twelve images; three files of the first are damaged, each in another way."""
    for number in range(NUM_IMAGES):
        file = root / ("first" if number < 12 else "second") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(picture(number)))
    first = root / "first"
    whole = (first / "03.png").read_bytes()
    (first / "03.png").write_bytes(whole[: len(whole) // 2])  # truncated
    (first / "04.png").write_bytes(b"<html>not found</html>")
    (first / "07.png").write_bytes(whole[:60] + bytes(len(whole) - 60))  # pixels overwritten
    return root


def image_table() -> datasets.Dataset:
    """The same images as rows of a data set, damage included."""
    rows = [{"bytes": png(picture(number)), "path": None} for number in range(NUM_IMAGES)]
    rows[3]["bytes"] = rows[3]["bytes"][:200]
    rows[4]["bytes"] = b"not an image"
    rows[7]["bytes"] = b""
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["first", "second"]),
            "id": datasets.Value("int64"),
        }
    )
    columns = {"picture": rows, "kind": [number // 12 for number in range(NUM_IMAGES)], "id": list(range(NUM_IMAGES))}
    return datasets.Dataset.from_dict(columns, features=features)


def write_parquet(table: datasets.Dataset, folder: Path) -> Path:
    folder.mkdir()
    for part in range(4):
        table.shard(4, part, contiguous=True).to_parquet(folder / f"train-{part:05d}-of-00004.parquet")
    return folder


def write_webdataset(table: datasets.Dataset, folder: Path) -> Path:
    folder.mkdir()
    raw = table.cast_column("picture", datasets.Image(decode=False))
    for part in range(4):
        with tarfile.open(folder / f"train-{part}.tar", "w") as tar:
            for row in raw.shard(4, part, contiguous=True):
                for suffix, content in (("png", row["picture"]["bytes"]), ("cls", str(row["kind"]).encode())):
                    info = tarfile.TarInfo(f"{row['id']:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def write_arrow(table: datasets.Dataset, folder: Path) -> Path:
    table.save_to_disk(folder)
    return folder
