"""The web page's modules in Node.js, against the Python that they follow."""

import json
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest
import torch

from vfmtok_hf import VFMTokImageProcessor
from vfmtok_hf.modeling.generation_vfmtok import (
    SamplingSettings,
    constant_guidance,
    power_cosine_guidance,
    sample_tokens,
    uniform_numbers,
)

from .conftest import ROOT


PAGE = ROOT / "spaces" / "vfmtok_web"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js: apt-get install nodejs")


def run(code: str, **data):
    """What a module of the page computes: `code` sees `data` and calls `give`."""
    frame = """
        import { readFileSync } from "node:fs";
        const data = JSON.parse(readFileSync(0));
        const give = (value) => console.log(JSON.stringify(value));
    """
    result = subprocess.run(
        [NODE, "--input-type=module", "--eval", frame + code],
        cwd=PAGE,
        input=json.dumps(data),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_node
@pytest.mark.parametrize("seed", [0, 1, 123_456_789, 2**32 - 1, 2**32 + 5, 2**53 - 1])
def test_a_seed_gives_torchs_numbers(seed):
    code = """
        import { TorchGenerator } from "./mt19937.js";
        const generator = new TorchGenerator(data.seed);
        give(Array.from({ length: 1000 }, () => generator.uniform()));
    """
    numbers = uniform_numbers(1000, 1, torch.Generator().manual_seed(seed), torch.device("cpu"))
    assert numbers.dtype is torch.float64
    assert run(code, seed=seed) == numbers[:, 0].tolist()


@needs_node
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.9, "top_k": 100},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.5},
        {"top_k": 2000},
        {"do_sample": False},
    ],
    ids=str,
)
def test_draws_are_those_of_the_package(settings):
    code = """
        import { TorchGenerator } from "./mt19937.js";
        import { drawToken } from "./sampling.js";
        const generator = new TorchGenerator(8);
        give(data.logits.map((row) => drawToken(Float32Array.from(row), data.settings, generator)));
    """
    settings = SamplingSettings(**settings)
    logits = torch.randn(300, 1024) * 4
    numbers = uniform_numbers(300, 1, torch.Generator().manual_seed(8), torch.device("cpu"))[:, 0]
    expected = logits.argmax(-1)
    if settings.do_sample:
        expected = sample_tokens(settings.choice.filter(logits, settings.limits("cpu")), numbers)
    names = {"topK": settings.top_k, "topP": settings.top_p, "doSample": settings.do_sample}
    drawn = run(code, logits=logits.tolist(), settings={"temperature": settings.temperature, **names})
    assert drawn == expected.tolist()


@needs_node
def test_a_draw_never_takes_a_token_without_probability():
    code = """
        import { sampleToken } from "./sampling.js";
        give([0, 0.999999999, 1].map((number) => sampleToken(Float32Array.from([-Infinity, 1, 2, -Infinity]), number)));
    """.replace("Infinity", "1e999")
    assert run(code) == [1, 2, 2]


@needs_node
def test_logits_that_are_not_finite_are_an_error():
    code = """
        import { drawToken } from "./sampling.js";
        try { drawToken(Float32Array.from([1, NaN]), { doSample: false }); } catch ({ message }) { give(message); }
    """
    assert "not finite" in run(code)


@needs_node
def test_guidance_scales_are_those_of_the_package():
    code = """
        import { guidanceScales } from "./sampling.js";
        give(data.asked.map((guidance) => guidanceScales(9, guidance)));
    """
    asked = [{"scale": 3}, {"scale": 0}, {"scale": 3, "interval": 4}, {"scale": 4, "power": 2.75, "interval": 5}]
    expected = [
        constant_guidance(9, 3),
        constant_guidance(9, 1),
        constant_guidance(9, 3, 4),
        power_cosine_guidance(9, 4, 2.75, 5),
    ]
    np.testing.assert_allclose(run(code, asked=asked), expected, rtol=1e-12)


@needs_node
def test_the_loop_guides_as_long_as_it_is_asked_to_and_releases_what_it_began():
    code = """
        import { generateTokens } from "./generation.js";
        const news = [];
        const newSequence = (label) => ({
          next: async (token) => { news.push([label, token]); return Float32Array.from([0, label === 5 ? -2 : 1, 0]); },
          release: () => news.push([label, "released"]),
        });
        const sizes = { numClasses: 5, conditionPositions: 2, numTokens: 4 };
        const settings = { label: 3, seed: 0, doSample: false, guidance: { scale: 2, interval: 0 } };
        const tokens = [];
        for await (const token of generateTokens(newSequence, sizes, settings)) tokens.push(token);
        give({ news, tokens });
    """
    result = run(code)
    assert result["tokens"] == [1, 1, 1, 1]
    both = [[[3, token], [5, token]] for token in (0, 0, 1)]
    assert result["news"] == [*sum(both, []), [5, "released"], [3, 1], [3, 1], [3, "released"]]


@needs_node
@pytest.mark.parametrize("size", [(64, 64), (100, 80), (333, 500), (129, 128), (31, 47), (1025, 640)], ids=str)
def test_images_become_the_processors_pixel_values(size):
    code = """
        import { centerSquare, toPixelValues } from "./pixels.js";
        const { width, height } = data;
        const image = { data: Uint8ClampedArray.from(Buffer.from(data.rgba, "hex")), width, height };
        give(Array.from(toPixelValues(centerSquare(image, 64).data)));
    """
    coarse = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)
    values = run(code, width=image.width, height=image.height, rgba=image.convert("RGBA").tobytes().hex())
    expected = VFMTokImageProcessor(size=64)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(torch.tensor(values).reshape(3, 64, 64), expected)


@needs_node
def test_values_become_the_processors_8_bit_levels():
    code = """
        import { toRgba } from "./pixels.js";
        give(Array.from(toRgba(Float32Array.from(data.values))));
    """
    images = torch.rand(1, 3, 4, 4) * 3 - 1.5
    levels = VFMTokImageProcessor.to_uint8(images)[0].permute(1, 2, 0)
    assert torch.equal(
        torch.tensor(run(code, values=images.flatten().tolist())).reshape(4, 4, 4)[..., :3], levels.long()
    )


def test_the_folder_is_complete_and_its_readme_names_every_file():
    readme = (PAGE / "README.md").read_text()
    assert "sdk: static" in readme
    files = {path.name for path in PAGE.iterdir()} - {"README.md"}
    assert {name for name in files if f"`{name}`" not in readme} == set()
    sources = {name: (PAGE / name).read_text() for name in files if name.endswith((".js", ".html", ".css"))}
    for name, source in sources.items():
        assert not any(word in source for word in ("cdn.", "unpkg", "googleapis")), name
