"""Image folders for training: `root/class_name/image.png`, decoded, augmented and sampled reproducibly."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
WHITE = (255, 255, 255)


class ImageFolder(Dataset):
    """
    Images of `root/class_name/*`, classes numbered in alphabetical order.

    An item is a function of (seed, epoch, index) alone, so a resumed run sees what an uninterrupted one would, with
    any number of workers.

    Args:
        root (`str` or `Path`): folder with one folder per class.
        image_size (`int`): side of the square result in pixels.
        crop_scale (`tuple[float, float]`, *optional*): range of the random crop's side as a share of the image's
            shorter side. Above 1 the image is padded with white. `None`: the whole central square, no augmentation.
        horizontal_flip (`bool`): mirror half of the images, in training (`crop_scale` given) only.
        cache_images (`bool`): keep the decoded images in memory, shrunk as far as the largest crop needs.
        seed (`int`): of the augmentation.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no images.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        crop_scale: tuple[float, float] | None = None,
        horizontal_flip: bool = False,
        cache_images: bool = False,
        seed: int = 0,
    ):
        files = sorted(file for file in Path(root).glob("*/*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise FileNotFoundError(f"No images in {root}: expected files like {root}/class_name/image.png.")
        self.files = files
        self.image_size = image_size
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.epoch = 0
        self.class_names = sorted({file.parent.name for file in files})
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.labels = [numbers[file.parent.name] for file in files]
        self.cache = [self._shrunk(_read_image(file)) for file in files] if cache_images else None

    def _shrunk(self, image: Image.Image) -> Image.Image:
        shortest_crop = self.crop_scale[0] if self.crop_scale else 1.0
        factor = self.image_size / (shortest_crop * min(image.size))
        if factor >= 1:
            return image
        return image.resize([max(round(side * factor), 1) for side in image.size], Image.Resampling.BICUBIC)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """`pixel_values` (3, image_size, image_size) in [-1, 1], `label`, `index`."""
        image = self.cache[index] if self.cache else _read_image(self.files[index])
        rng = np.random.default_rng((self.seed, self.epoch, index))
        pixels = torch.from_numpy(np.asarray(self._crop(image, rng)).copy()).permute(2, 0, 1)
        return {"pixel_values": pixels.float() / 127.5 - 1, "label": self.labels[index], "index": index}

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        shorter = min(image.size)
        scale = rng.uniform(*self.crop_scale) if self.crop_scale else 1.0
        side = scale * shorter
        shares = rng.uniform(size=2) if self.crop_scale else (0.5, 0.5)
        left, top = (share * (length - side) for share, length in zip(shares, image.size, strict=True))
        padding = max(0, int(np.ceil(side - shorter)))
        if padding:
            image = ImageOps.expand(image, padding, WHITE)
        # Rounding may carry the far edges a hair past the image, which Pillow refuses.
        box = (
            left + padding,
            top + padding,
            min(left + padding + side, image.width),
            min(top + padding + side, image.height),
        )
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)
        if self.crop_scale and self.horizontal_flip and rng.uniform() < 0.5:
            image = ImageOps.mirror(image)
        return image


def _read_image(file: Path) -> Image.Image:
    """RGB as a viewer shows it: EXIF rotation applied, transparency on white."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image)
        return image.convert("RGB")


class EpochSampler(Sampler[int]):
    """
    Order of one epoch, a function of (seed, epoch) alone.

    Args:
        labels (`list[int]`): class of each item.
        balance_power (`float`): 0 is a plain shuffle. Otherwise items are drawn with replacement so that a class of
            n items has a weight of n ** (1 - balance_power): 0.5 softens imbalance, 1 makes all classes equally likely.
        seed (`int`): of the order.
    """

    def __init__(self, labels: list[int], balance_power: float = 0.0, seed: int = 0):
        self.num_items = len(labels)
        self.balance_power = balance_power
        self.seed = seed
        self.epoch = 0
        counts = Counter(labels)
        self.weights = torch.tensor([counts[label] ** -balance_power for label in labels], dtype=torch.float64)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        if self.balance_power == 0:
            order = torch.randperm(self.num_items, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.num_items, replacement=True, generator=generator)
        return iter(order.tolist())
