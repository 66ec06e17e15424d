"""Small image folders for the tests of evaluation."""

from pathlib import Path

import numpy as np
import PIL.Image


def write_images(folder: Path, count: int, size: int | tuple[int, int] = 32, seed: int = 0) -> list[Path]:
    """Noise images `000.png`, `001.png`...; `size` is a side or (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:03d}.png" for number in range(count)]
    for file in files:
        PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return files


def write_color_classes(root: Path, count: int, seed: int) -> Path:
    """Classes `blue`, `green`, `red`: noisy images of that color."""
    random = np.random.default_rng(seed)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            PIL.Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root
