"""Find the example images that are nearest to an image, by tokens and by embedding."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import PIL.Image
import torch
import torch.nn.functional as F

from model import GRID_SIZE, PIPE
from pictures import data_url, pixel_values_of
from sampling import blank_tokens


EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.png"))
NUM_NEIGHBORS = 6
BATCH_SIZE = 16


@dataclass(frozen=True)
class Encoded:
    """Image tokens `(images, num_tokens)` and unit embeddings `(images, hidden_size)`."""

    image_tokens: torch.Tensor
    embeddings: torch.Tensor


@torch.no_grad()
def encode(pixel_values: torch.Tensor) -> Encoded:
    """Image tokens, and the embedding that the model computes from the tokens alone."""
    image_tokens = PIPE.vq_model.encode(pixel_values).image_tokens
    image_embeds = PIPE.vq_model.get_image_features(image_tokens=image_tokens)
    return Encoded(image_tokens, F.normalize(image_embeds, dim=-1))


@cache
def encoded_examples() -> Encoded:
    """All examples, encoded at the first request."""
    pixel_values = torch.cat([pixel_values_of(PIL.Image.open(path)) for path in EXAMPLES])
    parts = [encode(batch) for batch in pixel_values.split(BATCH_SIZE)]
    return Encoded(torch.cat([part.image_tokens for part in parts]), torch.cat([part.embeddings for part in parts]))


def nearest(picture: PIL.Image.Image) -> dict:
    """
    The nearest examples, JSON-serializable: `shared` by the number of equal tokens in the same cell, without the image's
    blank tokens, and `embedding` by the cosine similarity of embeddings. The image itself is excluded.
    """
    pixel_values = pixel_values_of(picture)
    query, examples = encode(pixel_values), encoded_examples()
    filled = query.image_tokens[0] != blank_tokens().to(pixel_values.device)
    equal = (examples.image_tokens == query.image_tokens) & filled
    shared, cosines = equal.sum(dim=1), examples.embeddings @ query.embeddings[0]
    others = ~(examples.image_tokens == query.image_tokens).all(dim=1)
    return {
        "grid": GRID_SIZE,
        "filled": int(filled.sum()),
        "query": data_url(PIPE.image_processor.postprocess(pixel_values)[0]),
        "shared": [
            {
                **shown(index),
                "score": f"{shared[index]} of {filled.sum()}",
                "cells": equal[index].nonzero()[:, 0].tolist(),
            }
            for index in ranking(shared, others)
        ],
        "embedding": [{**shown(index), "score": f"{cosines[index]:.2f}"} for index in ranking(cosines, others)],
    }


def ranking(scores: torch.Tensor, others: torch.Tensor) -> list[int]:
    """Indices of the highest scores among `others`, in descending order; ties keep their order."""
    order = scores.float().masked_fill(~others, -torch.inf).argsort(descending=True, stable=True)
    return order[:NUM_NEIGHBORS].tolist()


def shown(index: int) -> dict:
    """Name and image of an example."""
    return {"name": EXAMPLES[index].stem.split("_")[0], "image": data_url(PIL.Image.open(EXAMPLES[index]))}
