"""Images that share a batch are those that they would be alone."""

import random

import pytest
import torch

from tests.modeling.generators import tiny_ar, tiny_rar
from vfmtok_hf.serving.decoding import DecodeBatch, Drawing


SETTINGS = (
    {},
    {"temperature": 0.7, "top_k": 9},
    {"top_p": 0.8},
    {"do_sample": False},
    {"guidance_scale": 2.0},
    {"guidance_scale": 1.5, "guidance_interval": 4},
)


@pytest.fixture(params=["ar", "rar"])
def model(request):
    if request.param == "ar":
        return tiny_ar(num_image_tokens=25)
    return tiny_rar(num_image_tokens=25, num_position_embeddings=27, num_timestep_embeddings=27)


def drawing(model, number: int) -> Drawing:
    settings = model.sampling_settings(**SETTINGS[number % len(SETTINGS)])
    return Drawing(label=number % 5, seed=number, settings=settings)


def run(batch: DecodeBatch, arrivals: dict[int, list[Drawing]]) -> dict[int, torch.Tensor]:
    """Tokens by seed of images that arrive at given steps, and join as soon as there is room."""
    waiting, found, step = [], {}, 0
    while waiting or batch.drawings or step <= max(arrivals):
        waiting += arrivals.get(step, [])
        while waiting and batch.fits(waiting[0]):
            batch.add([waiting.pop(0)])
        if batch.drawings:
            complete = batch.step()
            found |= {drawing.seed: batch.image_tokens(drawing)[0] for drawing in complete}
            if complete:
                batch.remove(complete)
        step += 1
    return found


@torch.no_grad()
def test_images_that_come_and_go_have_the_tokens_of_generate(model):
    rng = random.Random(0)
    arrivals = {}
    for number in range(18):
        arrivals.setdefault(rng.randrange(60), []).append(drawing(model, number))
    together = run(DecodeBatch(model, max_rows=7), arrivals)
    assert sorted(together) == list(range(18))
    for number, tokens in together.items():
        generator = torch.Generator().manual_seed(number)
        expected = model.generate([number % 5], generator=generator, **SETTINGS[number % len(SETTINGS)])[0]
        assert torch.equal(tokens, expected), SETTINGS[number % len(SETTINGS)]


@torch.no_grad()
def test_logits_that_are_not_finite_are_reported(model):
    batch = DecodeBatch(model, 4)
    model.lm_head.weight.fill_(float("nan"))
    batch.add([drawing(model, 0)])
    for _ in range(2):
        batch.step()
    with pytest.raises(ValueError, match="not finite"):
        batch.image_tokens(batch.drawings[0])
