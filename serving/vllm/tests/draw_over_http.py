"""
Print the greedy image tokens that a vLLM server draws for every class of a RAR, as `vfmtok serve --engine URL` asks for them.

It runs in the environment of vfmtok-hf:

    python draw_over_http.py FOLDER URL
"""

import asyncio
import json
import sys

from vfmtok_hf import VFMTokRARForImageGeneration
from vfmtok_hf.serving.engines import VLLMEngine


async def main(folder: str, url: str) -> None:
    generator = VFMTokRARForImageGeneration.from_pretrained(folder)
    engine, greedy = VLLMEngine(url, generator), generator.sampling_settings(do_sample=False)
    draws = (engine.draw(label, 0, greedy) for label in range(generator.config.num_classes))
    print(json.dumps(await asyncio.gather(*draws)))  # noqa: T201
    await engine.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
