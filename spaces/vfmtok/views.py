"""Results as the templates of the `page` folder want them, JSON-serialisable."""

from model import GRID_SIZE, NUM_TOKENS, PIPE
from pictures import data_url
from sampling import Drawing
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


def drawing_view(settings: Settings, drawing: Drawing) -> dict:
    """Pictures with captions, and the numbers below them."""
    captions = picture_captions(settings)
    return {
        "pictures": [
            {"url": data_url(picture), "caption": caption, "file": f"{caption.replace(' ', '-')}.png"}
            for picture, caption in zip(drawing.pictures, captions, strict=True)
        ],
        "whole": drawing.tokens_drawn == NUM_TOKENS,
        "percent": round(100 * drawing.tokens_drawn / NUM_TOKENS),
        "tokens": f"{drawing.tokens_drawn} / {NUM_TOKENS}",
        "rate": f"{drawing.tokens_per_second:,.0f}",
        "seconds": f"{drawing.seconds:.2f}",
        "passes": 2 if settings.guidance > 1 else 1,
    }


def picture_captions(settings: Settings) -> list[str]:
    """Class and seed of each picture; seeds of one drawing follow each other."""
    name = PIPE.id2label[settings.class_id].split(",")[0]
    return [f"{name} {settings.seed + picture}" for picture in range(settings.images)]


def comparison_view(plain: Settings, plain_drawing: Drawing, guided: Settings, guided_drawing: Drawing) -> dict:
    """Two drawings beside each other, and one sentence."""
    longer = max(plain_drawing.seconds, guided_drawing.seconds)
    sides = [
        {"title": title, "drawing": drawing_view(settings, drawing), "share": round(100 * drawing.seconds / longer)}
        for title, settings, drawing in (
            ("Without guidance", plain, plain_drawing),
            (f"Guidance {guided.guidance:g}", guided, guided_drawing),
        )
    ]
    factor = guided_drawing.seconds / plain_drawing.seconds
    return {
        "sides": sides,
        "summary": f"Guidance took {factor:.1f} times as long here. Same seeds, same sampling settings.",
    }


def neighbours_view(neighbours: dict) -> dict:
    """The neighbours, with a veil over the cells that are not shared."""
    shared = [{**neighbour, "mask": veil(set(neighbour["cells"]))} for neighbour in neighbours["shared"]]
    return {**neighbours, "shared": shared}


def veil(open_cells: set[int]) -> str:
    """An SVG that covers all cells of the token grid but some."""
    covers = "".join(
        f'<rect x="{cell % GRID_SIZE}" y="{cell // GRID_SIZE}" width="1" height="1"/>'
        for cell in range(NUM_TOKENS)
        if cell not in open_cells
    )
    return f'<svg viewBox="0 0 {GRID_SIZE} {GRID_SIZE}" aria-hidden="true">{covers}</svg>'
