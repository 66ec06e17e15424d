"""
Linear probes of frozen representations: the paper's "L.P." column.

The protocol is MAE's (He et al. 2022, appendix A.1), which the authors cite: batch norm without affine parameters, one
linear layer, LARS, 90 epochs of a cosine with 10 of warm-up, no weight decay, random crops and flips. There are two differences.

Representations are computed once for `views` augmentations of each training image, and each epoch uses another one. MAE
augments again in each epoch.

MAE's learning rate, 0.1 x batch size / 256, is for the 1.3 million images of ImageNet. LARS moves the weights by a share of
their norm per step, so with a few thousand images they would hardly change. By default, the rate is therefore selected for
each representation on a tenth of the training images. `base_learning_rates=(0.1,)` uses MAE's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import nn
from torchvision.transforms import v2

from vfmtok_hf.data.sources import open_records
from vfmtok_hf.evaluation.features import ProgressCallback
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


PIXEL_GRID = 32
MIN_TRAINING_IMAGES = 20


@dataclass
class ProbeSettings:
    """
    Args:
        batch_size (`int`): 16384 as in MAE, or a tenth of the training images if that is smaller.
        base_learning_rates (`tuple[float, ...]`): per 256 images. Several are compared on held-out training images.
        views (`int`): augmentations of each training image.
    """

    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    base_learning_rates: tuple[float, ...] = (0.1, 1.0, 10.0, 50.0)
    views: int = 8
    seed: int = 0


@dataclass
class ProbeResult:
    """
    Args:
        top1 (`float`): share of test images that are classified correctly.
        mean_class_accuracy (`float`): mean of that share over classes, with equal weights.
        channels (`int`): width of the representation.
        base_learning_rate (`float`): the selected learning rate.
    """

    top1: float
    mean_class_accuracy: float
    channels: int
    base_learning_rate: float


class LabeledImages:
    """
    Labeled images.

    Args:
        pictures (sequence): images of any type and size that the image processor reads.
        labels (`Sequence[int]`): class of each image.
        class_names (`Sequence[str]`): class names, by class number.
        name (`str`): for messages.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(self, pictures: Sequence, labels: Sequence[int], class_names: Sequence[str], name: str):
        if len(set(labels)) < 2:
            raise ValueError(f"{name} has images of one class only: a probe needs two or more classes.")
        self.pictures = pictures
        self.labels = torch.tensor(labels)
        self.class_names = list(class_names)
        self.name = name
        self.processor = VFMTokImageProcessor(do_rescale=False, do_normalize=False)

    @classmethod
    def open(
        cls, source: str | Path, split: str = "train", image_column: str | None = None, label_column: str | None = None
    ) -> "LabeledImages":
        """
        Images of a source, with the arguments and errors of [`~vfmtok_hf.data.sources.open_records`].

        Raises:
            ValueError: fewer than two classes.
        """
        records = open_records(source, split, image_column, label_column)
        return cls(records, records.labels, records.class_names, str(source))

    def __len__(self) -> int:
        return len(self.pictures)

    def labels_as_in(self, other: "LabeledImages") -> torch.Tensor:
        """
        Labels in the class numbering of another set.

        Raises:
            ValueError: the classes differ.
        """
        differing = sorted(set(self.class_names) ^ set(other.class_names))
        if differing:
            raise ValueError(f"{other.name} and {self.name} have different classes: {', '.join(differing[:5])}.")
        return torch.tensor([other.class_names.index(name) for name in self.class_names])[self.labels]

    def batches(self, size: int, batch_size: int, view: int | None) -> Iterator[torch.Tensor]:
        """
        `pixel_values` `(at most batch_size, 3, size, size)` in [-1, 1]: center crops, or the augmentation `view`.
        """
        for start in range(0, len(self), batch_size):
            numbers = range(start, min(start + batch_size, len(self)))
            pixels = torch.stack([self._read(number, size, view) for number in numbers])
            yield pixels.float() / 127.5 - 1

    def _read(self, number: int, size: int, view: int | None) -> torch.Tensor:
        picture = self.pictures[number]
        if view is None:
            return self.processor(picture, size=size, return_tensors="pt")["pixel_values"][0]
        image = self.processor(picture, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
        augment = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((view, number)) % 2**63)
            image = augment(image)
            return image.flip(-1) if torch.rand(()) < 0.5 else image


@torch.no_grad()
def represent(model: VFMTokModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The probed representations of `pixel_values` `(batch_size, 3, image_size, image_size)`, each `(batch_size, channels)`:

    - `image_embeds`: the feature branch's class token, as in the paper.
    - `token_embeddings`: the concatenated codebook rows of all image tokens.
    - `vision_model`: the frozen vision model's last level, mean over positions.
    - `pixels`: the image itself, at 32 x 32.
    """
    encoded = model.encode(pixel_values, output_vision_features=True)
    pixels = F.interpolate(pixel_values, (PIXEL_GRID, PIXEL_GRID), mode="bilinear", antialias=True)
    return {
        "image_embeds": model.get_image_features(image_tokens=encoded.image_tokens),
        "token_embeddings": encoded.quantized_latents.flatten(1),
        "vision_model": encoded.vision_features[-1].mean(dim=(2, 3)),
        "pixels": pixels.flatten(1),
    }


def representations_of(
    model: VFMTokModel,
    images: LabeledImages,
    batch_size: int,
    views: int | None = None,
    progress_callback: ProgressCallback = lambda count: None,
) -> dict[str, torch.Tensor]:
    """
    Each representation of all images, `(views or 1, images, channels)` float32 on the CPU. Without `views`, images are
    center-cropped.

    Raises:
        ValueError: values that are not finite.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    numbers = [None] if views is None else range(views)
    for view in numbers:
        for pixel_values in images.batches(model.config.image_size, batch_size, view):
            for name, values in represent(model, pixel_values.to(model.device)).items():
                rows.setdefault(name, []).append(values.float().cpu())
            progress_callback(len(pixel_values))
    representations = {name: torch.cat(parts).unflatten(0, (len(numbers), -1)) for name, parts in rows.items()}
    for name, values in representations.items():
        if not values.isfinite().all():
            raise ValueError(f"The representation {name} has values that are NaN or infinite: check the weights.")
    return representations


def train_linear_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    settings: ProbeSettings,
) -> ProbeResult:
    """
    Train the classifier and test it.

    Args:
        train (`torch.FloatTensor` of shape `(views, images, channels)`), train_labels (`(images,)`).
        test (`torch.FloatTensor` of shape `(images, channels)`), test_labels (`(images,)`).
    """
    num_classes = int(train_labels.max()) + 1
    rate = _choose_learning_rate(train, train_labels, num_classes, settings)
    classifier = _fit(train, train_labels, num_classes, rate, settings)
    right = (classifier(test).argmax(-1) == test_labels).float()
    by_class = [right[test_labels == label].mean() for label in test_labels.unique()]
    return ProbeResult(right.mean().item(), torch.stack(by_class).mean().item(), train.shape[-1], rate)


def _choose_learning_rate(
    train: torch.Tensor, labels: torch.Tensor, num_classes: int, settings: ProbeSettings
) -> float:
    """The learning rate with the lowest cross-entropy on a random tenth of the training images, trained on the rest."""
    if len(settings.base_learning_rates) == 1:
        return settings.base_learning_rates[0]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(settings.seed))
    held_out, kept = order[::10], order[torch.arange(len(order)) % 10 != 0]

    def held_out_loss(rate: float) -> float:
        classifier = _fit(train[:, kept], labels[kept], num_classes, rate, settings)
        return F.cross_entropy(classifier(train[0, held_out]), labels[held_out]).item()

    return min(settings.base_learning_rates, key=held_out_loss)


def _fit(
    train: torch.Tensor, labels: torch.Tensor, num_classes: int, rate: float, settings: ProbeSettings
) -> Callable[..., torch.Tensor]:
    """Train a classifier that maps `(images, channels)` to `(images, classes)`, without gradient."""
    views, num_images, channels = train.shape
    generator = torch.Generator().manual_seed(settings.seed)
    linear = nn.Linear(channels, num_classes)
    with torch.no_grad():
        linear.weight.normal_(std=0.01, generator=generator)
        linear.bias.zero_()
    classifier = nn.Sequential(nn.BatchNorm1d(channels, eps=1e-6, affine=False), linear)
    batch_size = min(settings.batch_size, max(num_images // 10, 2))
    steps_per_epoch = num_images // batch_size
    peak = rate * batch_size / 256
    # As in MAE, only the step of the matrix is scaled by the ratio of norms.
    groups = [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias]}]
    optimizer = Lars(groups, lr=peak, momentum=0.9, weight_decay=0.0)
    for epoch in range(settings.epochs):
        features = train[epoch % views]
        order = torch.randperm(num_images, generator=generator)
        for step in range(steps_per_epoch):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            for group in optimizer.param_groups:
                group["lr"] = peak * _schedule(epoch + step / steps_per_epoch, settings)
            loss = F.cross_entropy(classifier(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.no_grad()(classifier.eval())


def _schedule(epoch: float, settings: ProbeSettings) -> float:
    """Linear warm-up to 1, then a half cosine to 0."""
    if epoch < settings.warmup_epochs:
        return epoch / settings.warmup_epochs
    share = (epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class ProbeData:
    """
    Args:
        train (`dict[str, torch.FloatTensor]`): each representation, `(views, images, channels)`.
        train_labels (`torch.LongTensor` of shape `(images,)`).
        test (`dict[str, torch.FloatTensor]`): the same of other images, `(images, channels)`.
        test_labels (`torch.LongTensor` of shape `(images,)`).
    """

    train: dict[str, torch.Tensor]
    train_labels: torch.Tensor
    test: dict[str, torch.Tensor]
    test_labels: torch.Tensor


def represent_data(
    model: VFMTokModel,
    train: LabeledImages,
    test: LabeledImages,
    views: int,
    batch_size: int = 32,
    progress_callback: ProgressCallback = lambda count: None,
) -> ProbeData:
    """
    Compute the inputs of `train_probes`. The arguments and errors are those of `evaluate_linear_probe`.
    """
    if len(train) < MIN_TRAINING_IMAGES:
        raise ValueError(
            f"A linear probe needs at least {MIN_TRAINING_IMAGES} training images, as a tenth of them chooses the learning "
            f"rate, got {len(train)}: add images."
        )
    test_labels = test.labels_as_in(train)
    train_values = representations_of(model, train, batch_size, views, progress_callback)
    test_values = representations_of(model, test, batch_size, progress_callback=progress_callback)
    return ProbeData(
        train_values, train.labels, {name: values[0] for name, values in test_values.items()}, test_labels
    )


def train_probes(
    data: ProbeData, settings: ProbeSettings, progress_callback: ProgressCallback = lambda count: None
) -> dict[str, ProbeResult]:
    """Train and test a classifier on each representation; `progress_callback` is called with 1 after each."""
    results = {}
    for name, values in data.train.items():
        results[name] = train_linear_probe(values, data.train_labels, data.test[name], data.test_labels, settings)
        progress_callback(1)
    return results


def evaluate_linear_probe(
    model: VFMTokModel,
    train: LabeledImages,
    test: LabeledImages,
    settings: ProbeSettings | None = None,
    batch_size: int = 32,
    progress_callback: ProgressCallback = lambda count: None,
) -> dict[str, ProbeResult]:
    """
    Train linear probes on all representations of `represent`.

    Args:
        train, test (`LabeledImages`): with the same classes.
        progress_callback: called after each batch with its number of images: first `images * views` for training, then those
            for testing.

    Raises:
        ValueError: fewer than 20 training images, classes that differ, or an image that cannot be read.
    """
    settings = settings or ProbeSettings()
    return train_probes(represent_data(model, train, test, settings.views, batch_size, progress_callback), settings)
