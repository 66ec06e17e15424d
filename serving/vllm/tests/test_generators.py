"""Greedy tokens are those of vfmtok-hf's `generate`, every one, in any company."""

import pytest
from conftest import draw_all, engine, prompt, sampling


@pytest.fixture(scope="module")
def emoji(references):
    with engine(references["emoji"]["folder"]) as llm:
        yield llm


def test_the_shipped_rar(emoji, references):
    """Its heads are padded from 48 to 64."""
    assert draw_all(emoji) == references["emoji"]["tokens"]


def test_images_join_between_the_steps_of_others(emoji, references):
    tokens, interval = references["emoji"]["tokens"], 5
    labels = [number % len(tokens) for number in range(28)]
    drawn, num_running = {}, []
    for step in range(interval * len(labels) + len(tokens[0])):
        number, is_between = divmod(step, interval)
        if number < len(labels) and not is_between:
            emoji.llm_engine.add_request(str(number), prompt(emoji, labels[number]), sampling(emoji))
        num_running.append(emoji.llm_engine.get_num_unfinished_requests())
        for output in emoji.llm_engine.step():
            drawn[int(output.request_id)] = list(output.outputs[0].token_ids)
    assert max(num_running) > 20
    assert [drawn[number] for number in range(len(labels))] == [tokens[label] for label in labels]


def test_a_seed_gives_the_same_image_in_any_company(emoji):
    seeds = [sampling(emoji, temperature=0.9, top_k=100, seed=seed) for seed in range(32)]
    together = emoji.generate([prompt(emoji, 3)] * 32, seeds, use_tqdm=False)
    images = [list(output.outputs[0].token_ids) for output in together]
    assert len({*map(tuple, images)}) == 32
    for seed in (0, 7, 31):
        (alone,) = emoji.generate([prompt(emoji, 3)], seeds[seed], use_tqdm=False)
        assert list(alone.outputs[0].token_ids) == images[seed]


def test_ar(references):
    """Its heads are padded from 100 to 112."""
    with engine(references["ar"]["folder"]) as llm:
        assert draw_all(llm) == references["ar"]["tokens"]


def test_guidance_of_ar(references):
    ar = references["ar"]
    with engine(ar["folder"], hf_overrides=ar["guidance"]) as llm:
        assert llm.model_config.hf_config.guidance_scales == [*ar["guidance_scales"], 1.0]
        assert draw_all(llm) == ar["guided_tokens"]


def test_rar(references):
    """Its heads are padded from 88 to 96."""
    with engine(references["rar"]["folder"]) as llm:
        assert draw_all(llm) == references["rar"]["tokens"]


def test_guidance_of_rar_compiled(references):
    rar = references["rar"]
    with engine(rar["folder"], hf_overrides=rar["guidance"], enforce_eager=False) as llm:
        assert llm.model_config.hf_config.guidance_scales == pytest.approx([1.0, *rar["guidance_scales"], 1.0])
        assert draw_all(llm) == rar["guided_tokens"]
