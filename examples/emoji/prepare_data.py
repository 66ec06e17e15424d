"""Build a labeled image folder of emoji from pinned npm packages, 64 x 64 unless `--size` says otherwise.

    python examples/emoji/prepare_data.py --output data/emoji64

It needs the `npm` client and `pip install "vfmtok-hf[emoji]"`. Packages are pinned by version and sha256, so every run gives the
same images:

    OUTPUT/train/<class>/<style>_<codepoint>.png         OUTPUT/validation/<class>/...
    OUTPUT/classes.json        labels, synonyms, counts, held-out emoji
    OUTPUT/ATTRIBUTION.md      authors and licenses of the images

The validation split holds out whole emoji: every style and every skin tone of a held-out emoji is in `validation`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from classes import CLASSES
from PIL import Image
from sources import CATALOG_SOURCE, SOURCES, Source


MARGIN = 1 / 32  # white on each side, relative to the image: nothing touches the border
SVG_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


class PrepareError(Exception):
    """A failure that the user can fix. `main` prints it in one line."""


# --- Downloads -------------------------------------------------------------------------------------------------------


def fetch(source: Source, cache: Path) -> Path:
    """Path of the verified tarball of `source` in `cache`, downloaded by npm if it is not there yet."""
    archive = cache / source.archive
    if not archive.exists():
        npm_pack(source, cache)
    verify_sha256(archive, source)
    return archive


def npm_pack(source: Source, cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PrepareError("`npm` was not found: install Node.js with npm, which downloads the emoji packages")
    specification = f"{source.package}@{source.version}"
    print(f"downloading {specification}", flush=True)
    # Into a folder of its own first: an interrupted download never looks like a complete one.
    with tempfile.TemporaryDirectory(dir=cache) as partial:
        result = subprocess.run([npm, "pack", "--silent", specification], cwd=partial, capture_output=True, text=True)
        if result.returncode != 0:
            reason = " ".join(result.stderr.split()) or "no message"
            raise PrepareError(f"`npm pack {specification}` failed: check the network and npm's settings ({reason})")
        os.replace(Path(partial) / source.archive, cache / source.archive)


def verify_sha256(archive: Path, source: Source) -> None:
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != source.sha256:
        raise PrepareError(
            f"{source.package}@{source.version}: sha256 is {actual}, expected {source.sha256};"
            f" delete {archive} to download it again"
        )


# --- What an emoji is called -----------------------------------------------------------------------------------------


def normalize_codepoints(text: str) -> str:
    """`1F3F3-FE0F-200D-1F308` -> `1f3f3-200d-1f308`: the styles use variation selectors differently, which do not change the images."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def to_slug(name: str) -> str:
    """Convert an emoji's name from any style's spelling to a common form: `waving-hand-light`, `croatia`."""
    slug = re.sub(r"[\s_-]+", "-", re.sub(r"[^\w\s-]", "", name.lower())).strip("-")
    slug = re.sub(r"(?<!keycap)-[12]$", "", slug)  # two drawings of one emoji: the first is used
    return re.sub(r"^flag-(for-)?(flag-)?", "", slug).replace("-skin-tone", "")


def slugs_to_codepoints(catalog: list[dict]) -> dict[str, str]:
    """Iconify sets name pictures in words; both the Unicode names and the (newer) CLDR names are in use."""
    from emoji import EMOJI_DATA

    table: dict[str, str] = {}
    for characters, data in EMOJI_DATA.items():
        codepoints = "-".join(f"{ord(character):x}" for character in characters)
        table.setdefault(to_slug(data["en"]), normalize_codepoints(codepoints))
    for entry in catalog:
        table.setdefault(to_slug(entry["name"] or ""), normalize_codepoints(entry["unified"]))
    for slug, codepoints in list(table.items()):
        table.setdefault(slug.replace("-", ""), codepoints)  # a set without hyphens
    return table


def codepoints_to_families(catalog: list[dict]) -> dict[str, dict]:
    """Codepoints, skin tones included -> the catalog entry of the base emoji, the *family*."""
    families = {}
    for entry in catalog:
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            families[normalize_codepoints(variant["unified"])] = entry
    return families


def class_of(entry: dict) -> str | None:
    """Class of a catalog entry, or `None`."""
    for name, rule in CLASSES.items():
        if entry["short_name"] in rule.exclude:
            continue
        if entry["subcategory"] in rule.subcategories or entry["short_name"] in rule.include:
            return name
    return None


def held_out(families: Iterable[str], share: float) -> set[str]:
    """`share` of the families, at least one, chosen by the hash of their names, so the choice does not depend on other families."""
    ranked = sorted(set(families), key=lambda family: hashlib.sha256(family.encode()).digest())
    return set(ranked[: max(1, round(share * len(ranked)))])


# --- Pictures --------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    style: str
    codepoints: str
    label: str
    family: str
    data: bytes  # SVG text, PNG or WebP

    @property
    def file_name(self) -> str:
        return f"{self.style}_{self.codepoints}.png"


def read_pictures(archive: Path, source: Source, slugs: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """(codepoints, encoded picture) of everything in the archive."""
    if source.pictures.endswith(".json"):
        yield from read_iconify(json.loads(read_member(archive, source.pictures)), slugs)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            folder, _, file_name = member.name.rpartition("/")
            if folder == source.pictures:
                yield normalize_codepoints(file_name.rpartition(".")[0]), tar.extractfile(member).read()


def read_iconify(collection: dict, slugs: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    width, height = collection["width"], collection["height"]
    for name, icon in collection["icons"].items():
        codepoints = slugs.get(to_slug(name))
        if codepoints is None:
            continue
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', width)} {icon.get('height', height)}"
        yield codepoints, f'<svg {SVG_NAMESPACES} viewBox="{box}">{icon["body"]}</svg>'.encode()


def read_member(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as tar:
        return tar.extractfile(name).read()


def collect(archives: dict[Source, Path]) -> list[Picture]:
    """Pictures of all sources that belong to a class. If a style has two names for an emoji, the first is used."""
    catalog = json.loads(read_member(archives[CATALOG_SOURCE], CATALOG_SOURCE.pictures))
    slugs, families = slugs_to_codepoints(catalog), codepoints_to_families(catalog)
    pictures: dict[str, Picture] = {}
    for source in SOURCES:
        for codepoints, data in read_pictures(archives[source], source, slugs):
            entry = families.get(codepoints)
            label = class_of(entry) if entry else None
            if label is None or source.style in CLASSES[label].exclude_styles:
                continue
            picture = Picture(source.style, codepoints, label, entry["short_name"], data)
            pictures.setdefault(picture.file_name, picture)
    return list(pictures.values())


def decode(data: bytes, image_size: int) -> Image.Image:
    if data.startswith(b"<svg"):
        from resvg_py import svg_to_bytes

        # Twice the final size, so that thin lines are averaged and not lost.
        data = bytes(svg_to_bytes(svg_string=data.decode(), width=2 * image_size, height=2 * image_size))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def composite(image: Image.Image, image_size: int) -> Image.Image:
    """RGBA of any size -> square RGB: fitted into the image without its margin, centered on white."""
    white = Image.new("RGBA", image.size, "white")
    opaque = Image.alpha_composite(white, image).convert("RGB")
    scale = image_size * (1 - 2 * MARGIN) / max(opaque.size)
    size = tuple(max(1, round(side * scale)) for side in opaque.size)
    canvas = Image.new("RGB", (image_size, image_size), "white")
    canvas.paste(opaque.resize(size, Image.Resampling.LANCZOS), tuple((image_size - side) // 2 for side in size))
    return canvas


def draw(picture: Picture, path: Path, image_size: int) -> None:
    composite(decode(picture.data, image_size), image_size).save(path, optimize=True)


# --- Output ----------------------------------------------------------------------------------------------------------


def write_dataset(
    pictures: list[Picture], output: Path, image_size: int, validation_share: float, workers: int
) -> dict:
    """Write the image folder and return the contents of classes.json."""
    families = defaultdict(set)
    for picture in pictures:
        families[picture.label].add(picture.family)
    validation = {label: held_out(families[label], validation_share) for label in CLASSES}
    paths, counts = [], {"train": Counter(), "validation": Counter()}
    for picture in pictures:
        split = "validation" if picture.family in validation[picture.label] else "train"
        folder = output / split / picture.label
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / picture.file_name)
        counts[split][picture.label] += 1
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(draw, pictures, paths, repeat(image_size), chunksize=64))

    labels = sorted(CLASSES)  # the order an image-folder reader gives them
    summary = {
        "image_size": image_size,
        "id2label": {index: ", ".join((label, *CLASSES[label].synonyms)) for index, label in enumerate(labels)},
        "counts": {split: {label: counts[split][label] for label in labels} for split in counts},
        "held_out": {label: sorted(validation[label]) for label in labels},
    }
    (output / "classes.json").write_text(json.dumps(summary, indent=2) + "\n")
    introduction = (
        f"The images in this folder are emoji, scaled to {image_size} x {image_size} pixels on white.\n"
        "File names begin with the style."
    )
    (output / "ATTRIBUTION.md").write_text(attribution(introduction))
    return summary


def attribution(introduction: str) -> str:
    """The text of ATTRIBUTION.md: `introduction`, then authors and licenses of all styles."""
    rows = "\n".join(
        f"| `{s.style}` | {s.author} | {s.license} | {s.url} | `{s.package}@{s.version}` |" for s in SOURCES
    )
    return f"""# Attribution

{introduction}

| style | drawn by | license | project | package |
|---|---|---|---|---|
{rows}

Licenses: Apache-2.0 https://www.apache.org/licenses/LICENSE-2.0,
CC-BY-4.0 https://creativecommons.org/licenses/by/4.0/,
MIT https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE.
Changes made: rasterized, scaled, composited on white.
"""


def build(output: Path, cache: Path, image_size: int, validation_share: float, workers: int) -> dict:
    cache.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = collect({source: fetch(source, cache) for source in (CATALOG_SOURCE, *SOURCES)})
    # Beside the output, so that the rename is atomic and the folder appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        partial = Path(temporary) / output.name
        summary = write_dataset(pictures, partial, image_size, validation_share, workers)
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)
    return summary


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="image folder to write")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images in pixels [64]")
    parser.add_argument("--cache", type=Path, help="folder for the downloaded packages, 110 MB [OUTPUT-downloads]")
    parser.add_argument("--validation-share", type=float, default=0.05, help="share of each class to hold out [0.05]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render images [all cores]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUTPUT")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.output.exists() and not (options.output / "classes.json").exists():
        print(f"error: {options.output} exists and is not such a dataset; choose another --output", file=sys.stderr)
        return 1
    if options.output.exists() and not options.overwrite:
        print(f"{options.output} is already there; --overwrite builds it again")
        return 0
    missing = [package for package in ("emoji", "resvg_py") if importlib.util.find_spec(package) is None]
    if missing:
        print(f'error: {" and ".join(missing)} missing: pip install "vfmtok-hf[emoji]", and npm', file=sys.stderr)
        return 1
    cache = options.cache or options.output.with_name(f"{options.output.name}-downloads")
    try:
        summary = build(options.output, cache, options.size, options.validation_share, options.workers)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for label, train in summary["counts"]["train"].items():
        print(f"{label:10} {train:5} train {summary['counts']['validation'][label]:4} validation")
    print(f"{sum(summary['counts']['train'].values())} training images in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
