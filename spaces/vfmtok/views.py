"""Convert results to JSON-serializable objects for the templates of the `page` folder."""

import PIL.Image

from model import CAN_INPAINT, GRID_SIZE, NUM_TOKENS, PIPE
from neighbors import EXAMPLES
from pictures import data_url
from sampling import Generation
from settings import Settings, class_choices


def page_facts() -> dict:
    """The model's sizes, for the header."""
    config = PIPE.vq_model.config
    return {
        "facts": [
            f"{config.image_size} × {config.image_size} pixels",
            f"{NUM_TOKENS} tokens per image",
            f"codebook of {config.codebook_size:,}",
            f"{len(PIPE.id2label)} classes",
        ]
    }


def class_thumbnails() -> list[dict]:
    """Name, value and thumbnail of each class. A class without an example image has no thumbnail."""
    thumbnails = {path.stem.split("_")[0]: path for path in reversed(EXAMPLES)}
    return [
        {
            "value": value,
            "name": names.split(",")[0],
            "names": names.casefold(),
            "thumbnail": data_url(PIL.Image.open(thumbnails[value])) if value in thumbnails else None,
        }
        for names, value in class_choices()
    ]


def generation_view(settings: Settings, generation: Generation) -> dict:
    """Images with captions, a veil over tokens that are not generated yet, and the numbers below them."""
    finished = generation.tokens_generated == NUM_TOKENS
    return {
        "images": [
            {"url": data_url(image), "caption": caption, "file": download_name(caption)}
            for image, caption in zip(generation.images, image_captions(settings), strict=True)
        ],
        "label": settings.label,
        "columns": grid_columns(settings.images),
        "whole": finished,
        "inpaint": CAN_INPAINT,
        "veil": "" if finished else veil(set(range(generation.tokens_generated))),
        "percent": round(100 * generation.tokens_generated / NUM_TOKENS),
        "tokens": f"{generation.tokens_generated} / {NUM_TOKENS}",
        "rate": f"{generation.tokens_per_second:,.0f}",
        "seconds": f"{generation.seconds:.2f}",
        "passes": 2 if settings.guidance > 1 else 1,
    }


def grid_columns(images: int) -> int:
    """Columns of a grid of images that is about as wide as a page is."""
    return images if images <= 3 else (images + 1) // 2


def image_captions(settings: Settings) -> list[str]:
    """Class and seed of each image. The seeds of one generation are consecutive."""
    name = PIPE.id2label[settings.class_id].split(",")[0]
    return [f"{name}, seed {settings.seed + image}" for image in range(settings.images)]


def download_name(caption: str) -> str:
    """File name of a captioned image."""
    return f"{caption.replace(', ', '-').replace(' ', '-')}.png"


def comparison_view(
    plain: Settings, plain_generation: Generation, guided: Settings, guided_generation: Generation
) -> dict:
    """The same seeds without and with guidance, and their speed."""
    fastest = max(plain_generation.tokens_per_second, guided_generation.tokens_per_second)
    sides = [
        {
            "title": title,
            "generation": generation_view(settings, generation),
            "share": round(100 * generation.tokens_per_second / fastest),
        }
        for title, settings, generation in (
            ("Without guidance", plain, plain_generation),
            (f"Guidance scale {guided.guidance:g}", guided, guided_generation),
        )
    ]
    factor = plain_generation.tokens_per_second / guided_generation.tokens_per_second
    return {
        "sides": sides,
        "summary": f"Same class, seeds and sampling settings. Sampling without guidance was {factor:.1f} times as fast here.",
    }


def neighbors_view(neighbors: dict) -> dict:
    """The neighbors, with a veil over the cells whose tokens differ."""
    shared = [{**neighbor, "mask": veil(set(neighbor["cells"]))} for neighbor in neighbors["shared"]]
    return {**neighbors, "shared": shared}


def veil(open_cells: set[int]) -> str:
    """An SVG that covers all cells of the token grid except `open_cells`."""
    covers = "".join(
        f'<rect x="{cell % GRID_SIZE}" y="{cell // GRID_SIZE}" width="1" height="1"/>'
        for cell in range(NUM_TOKENS)
        if cell not in open_cells
    )
    return f'<svg viewBox="0 0 {GRID_SIZE} {GRID_SIZE}" aria-hidden="true">{covers}</svg>'
