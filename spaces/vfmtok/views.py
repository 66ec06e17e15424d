"""Results as the templates of the `page` folder want them, JSON-serializable."""

from model import GRID_SIZE, NUM_TOKENS, PIPE
from pictures import data_url
from sampling import Generation
from settings import Settings


def page_facts() -> dict:
    """What the header says about the model."""
    config = PIPE.vq_model.config
    return {
        "facts": [
            f"{config.image_size} × {config.image_size} pixels",
            f"{NUM_TOKENS} tokens a picture",
            f"codebook of {config.codebook_size:,}",
            f"{len(PIPE.id2label)} classes",
        ]
    }


def generation_view(settings: Settings, generation: Generation) -> dict:
    """Pictures with captions, and the numbers below them."""
    captions = picture_captions(settings)
    return {
        "pictures": [
            {"url": data_url(picture), "caption": caption, "file": f"{caption.replace(' ', '-')}.png"}
            for picture, caption in zip(generation.pictures, captions, strict=True)
        ],
        "whole": generation.tokens_generated == NUM_TOKENS,
        "percent": round(100 * generation.tokens_generated / NUM_TOKENS),
        "tokens": f"{generation.tokens_generated} / {NUM_TOKENS}",
        "rate": f"{generation.tokens_per_second:,.0f}",
        "seconds": f"{generation.seconds:.2f}",
        "passes": 2 if settings.guidance > 1 else 1,
    }


def picture_captions(settings: Settings) -> list[str]:
    """Class and seed of each picture; seeds of one generation follow each other."""
    name = PIPE.id2label[settings.class_id].split(",")[0]
    return [f"{name} {settings.seed + picture}" for picture in range(settings.images)]


def comparison_view(
    plain: Settings, plain_generation: Generation, guided: Settings, guided_generation: Generation
) -> dict:
    """Two generations beside each other, and one sentence."""
    longer = max(plain_generation.seconds, guided_generation.seconds)
    sides = [
        {
            "title": title,
            "generation": generation_view(settings, generation),
            "share": round(100 * generation.seconds / longer),
        }
        for title, settings, generation in (
            ("Without guidance", plain, plain_generation),
            (f"Guidance {guided.guidance:g}", guided, guided_generation),
        )
    ]
    factor = guided_generation.seconds / plain_generation.seconds
    return {
        "sides": sides,
        "summary": f"Guidance took {factor:.1f} times as long here. Same seeds, same sampling settings.",
    }


def neighbors_view(neighbors: dict) -> dict:
    """The neighbors, with a veil over the cells that are not shared."""
    shared = [{**neighbor, "mask": veil(set(neighbor["cells"]))} for neighbor in neighbors["shared"]]
    return {**neighbors, "shared": shared}


def veil(open_cells: set[int]) -> str:
    """An SVG that covers all cells of the token grid but some."""
    covers = "".join(
        f'<rect x="{cell % GRID_SIZE}" y="{cell // GRID_SIZE}" width="1" height="1"/>'
        for cell in range(NUM_TOKENS)
        if cell not in open_cells
    )
    return f'<svg viewBox="0 0 {GRID_SIZE} {GRID_SIZE}" aria-hidden="true">{covers}</svg>'
