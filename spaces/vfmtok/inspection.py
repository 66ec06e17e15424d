"""What each token of an image looks at, and how the image changes when its tokens change."""

import gradio as gr
import PIL.Image
import torch

from vfmtok_hf.data.statistics import psnr
from vfmtok_hf.plotting import LEVEL_COLORS

from model import CODEBOOK_SIZE, GRID_SIZE, NUM_TOKENS, PIPE
from pictures import data_url, pixel_values_of
from sampling import blank_tokens


# Sampling locations are sent to the page as integers. The image's side has this many units.
UNITS = 1000


@torch.no_grad()
def inspect(picture: PIL.Image.Image) -> dict:
    """
    Everything that the page shows about an image's tokens, JSON-serializable.

    `points` contains, for each token, x, y and weight of all locations where it looks in the encoder's last layer, in
    `UNITS`. Heads and feature levels are merged, so the weights of a token sum to the number of heads. `spread` is the
    share of the weight outside of the token's own cell.
    """
    pixel_values = pixel_values_of(picture)
    encoded = PIPE.vq_model.encode(pixel_values, output_sampling_locations=True)
    reconstruction = PIPE.vq_model.decode(image_tokens=encoded.image_tokens).reconstruction
    eight_bit = (PIPE.image_processor.postprocess(images, "pt") for images in (pixel_values, reconstruction))
    _, _, _, levels, points_per_level, _ = encoded.sampling_locations[-1].shape
    # (1, tokens, heads, levels, points, 2) -> tokens, locations, 2
    locations = encoded.sampling_locations[-1][0].flatten(1, 3)
    weights = encoded.attention_weights[-1][0].flatten(1)
    points = torch.cat([locations, weights[..., None]], dim=-1) * UNITS
    return {
        "grid": GRID_SIZE,
        "codebook": CODEBOOK_SIZE,
        "tokens": encoded.image_tokens[0].tolist(),
        "blank": blank_tokens().tolist(),
        "points": points.round().int().flatten(1).tolist(),
        "units": UNITS,
        "levels": levels,
        "points_per_level": points_per_level,
        "colors": LEVEL_COLORS,
        "spread": weight_outside_own_cell(locations, weights),
        "psnr": psnr(*eight_bit, data_range=1).item(),
        "original": to_url(pixel_values),
        "reconstruction": to_url(reconstruction),
    }


def weight_outside_own_cell(locations: torch.Tensor, weights: torch.Tensor) -> float:
    """Share of `(tokens, locations)` weights whose `(tokens, locations, 2)` locations lie outside of the token's cell."""
    cells = (locations * GRID_SIZE).floor().long()
    own = torch.arange(NUM_TOKENS, device=locations.device)[:, None]
    outside = (cells[..., 0] != own % GRID_SIZE) | (cells[..., 1] != own // GRID_SIZE)
    return float((weights * outside).sum() / weights.sum())


def to_url(pixel_values: torch.Tensor) -> str:
    """Encode a batch with one image as a `data:` URL."""
    return data_url(PIPE.image_processor.postprocess(pixel_values)[0])


def decode_tokens(image_tokens: list[int]) -> str:
    """
    Decode the tokens of one image to a `data:` URL.

    Raises:
        gr.Error: the number of tokens is wrong, or a token is not in the codebook.
    """
    whole = isinstance(image_tokens, list) and all(type(token) is int for token in image_tokens)
    if not whole or len(image_tokens) != NUM_TOKENS or not 0 <= min(image_tokens) <= max(image_tokens) < CODEBOOK_SIZE:
        raise gr.Error(
            f"An image has {NUM_TOKENS} tokens, integers from 0 to {CODEBOOK_SIZE - 1}.", print_exception=False
        )
    return data_url(PIPE.detokenize(torch.tensor([image_tokens]))[0])
