"""Codebook usage, and where in the image each anchor looks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import PIL.Image
import torch

from vfmtok_hf.data.pictures import Picture, batches_of
from vfmtok_hf.data.statistics import CodebookStatistics, codebook_statistics, entropy_bits
from vfmtok_hf.evaluation.features import ProgressCallback
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.pipelines import VFMTokPipeline


def token_count_remarks(counts: torch.Tensor) -> list[str]:
    """
    Remarks about usage and perplexity of too few tokens. In n samples of K equally frequent codes, a share of exp(-n / K)
    of the codes does not occur; with ten tokens per code, that is less than 0.01 %.
    """
    num_tokens, codebook_size = int(counts.sum()), len(counts)
    if num_tokens >= 10 * codebook_size:
        return []
    return [
        f"{num_tokens} tokens for {codebook_size} codes: codebook usage and perplexity are too low and increase with the "
        "number of images."
    ]


@dataclass
class AnchorStatistics:
    """
    Where anchors look, as means over images. Lengths are in cells of the anchor grid, so 0.5 is the distance from a cell's
    center to its edge. Heads have equal weights, and locations within a head have their attention weights.

    Args:
        displacement (`torch.Tensor` of shape `(layers, num_anchors)`): from an anchor's reference point, its cell's center,
            to the weighted mean of its sampling locations.
        spread (`torch.Tensor` of shape `(layers, num_anchors)`): weighted root mean square distance of the locations from
            that mean.
        outside_cell (`torch.Tensor` of shape `(layers, num_anchors)`): share of the weight on locations outside of the
            anchor's own cell.
        outside_image (`torch.Tensor` of shape `(layers, num_anchors)`): share of the weight outside of the image, where
            zeros are read.
        content_share (`torch.Tensor` of shape `(layers,)`): share of the mean squared displacement that varies between
            images. At 0, anchors look at the same locations in every image.
    """

    displacement: torch.Tensor
    spread: torch.Tensor
    outside_cell: torch.Tensor
    outside_image: torch.Tensor
    content_share: torch.Tensor


class AnchorTracker:
    """Accumulates `AnchorStatistics` over batches of outputs of `VFMTokModel.encode`."""

    def __init__(self, reference_points: torch.Tensor):
        """`reference_points` `(num_anchors, 2)` as (x, y) in [0, 1]^2."""
        self.reference_points = reference_points.cpu().double()
        self.cells_per_side = round(len(reference_points) ** 0.5)
        self.parts: list[dict[str, torch.Tensor]] = []

    def update(self, sampling_locations: Sequence[torch.Tensor], attention_weights: Sequence[torch.Tensor]) -> None:
        """Add one tensor per layer, `(batch_size, num_anchors, heads, levels, points, 2)`, and the weights without the 2."""
        layers = [
            self._of_layer(locations, weights)
            for locations, weights in zip(sampling_locations, attention_weights, strict=True)
        ]
        self.parts.append({name: torch.stack([layer[name] for layer in layers], dim=1) for name in layers[0]})

    def _of_layer(self, locations: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        # batch_size, num_anchors, heads * levels * points(, 2)
        locations = locations.flatten(2, 4).cpu().double()
        weights = weights.flatten(2).cpu().double()
        weights = weights / weights.sum(-1, keepdim=True)
        # batch_size, num_anchors, heads * levels * points, 2, in cells from the reference point
        offsets = (locations - self.reference_points[:, None]) * self.cells_per_side
        center = (offsets * weights[..., None]).sum(2)
        squared_distance = (offsets - center[:, :, None]).square().sum(-1)
        outside_image = ((locations < 0) | (locations > 1)).any(-1).double()
        return {
            "center": center,
            "spread": (squared_distance * weights).sum(-1).sqrt(),
            "outside_cell": ((offsets.abs() > 0.5).any(-1).double() * weights).sum(-1),
            "outside_image": (outside_image * weights).sum(-1),
        }

    def statistics(self) -> AnchorStatistics:
        # images, layers, num_anchors(, 2)
        columns = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
        center = columns.pop("center")
        total = center.square().sum(-1).mean(dim=(0, 2))
        varying = (center - center.mean(0)).square().sum(-1).mean(dim=(0, 2))
        return AnchorStatistics(
            displacement=center.norm(dim=-1).mean(0),
            content_share=torch.where(total > 0, varying / total.clamp_min(1e-12), 0.0),
            **{name: column.mean(0) for name, column in columns.items()},
        )


@dataclass
class TokenResult:
    """
    Args:
        num_images (`int`): how many.
        token_counts (`torch.LongTensor` of shape `(codebook_size,)`): how often each code occurred.
        codebook (`CodebookStatistics`): statistics of these counts.
        position_entropy (`torch.Tensor` of shape `(num_anchors,)`): entropy in bits of the codes at each position, at
            most log2 of the number of images.
        anchors (`AnchorStatistics`): where anchors look.
    """

    num_images: int
    token_counts: torch.Tensor
    codebook: CodebookStatistics
    position_entropy: torch.Tensor
    anchors: AnchorStatistics

    def summary(self) -> dict[str, object]:
        """Values for a JSON file: means over anchors by layer, and the histogram of code counts."""
        anchors = {
            name: [round(value, 4) for value in (values.mean(-1) if values.ndim == 2 else values).tolist()]
            for name, values in vars(self.anchors).items()
        }
        return {
            "num_images": self.num_images,
            "codebook_size": len(self.token_counts),
            "codebook_usage": self.codebook.usage,
            "codebook_entropy_bits": self.codebook.entropy,
            "codebook_perplexity": self.codebook.perplexity,
            "position_entropy_bits": [round(value, 4) for value in self.position_entropy.tolist()],
            "anchors_by_layer": anchors,
            "token_counts": self.token_counts.tolist(),
        }


@torch.no_grad()
def evaluate_tokens(
    pipe: VFMTokPipeline,
    pictures: Iterable[Picture],
    batch_size: int = 16,
    progress_callback: ProgressCallback = lambda count: None,
) -> TokenResult:
    """
    Compute statistics of image tokens and of sampling locations.

    Args:
        pictures (`Iterable[Picture]`): paths of image files, or PIL images; read once, in order.

    Raises:
        ValueError: an image is unreadable (the error names it), or there are none.
    """
    model: VFMTokModel = pipe.vq_model
    tracker = AnchorTracker(model.anchor_encoder.reference_points(model.device))
    all_tokens = []
    for batch in batches_of(pictures, batch_size):
        pixel_values = pipe.image_processor(batch, return_tensors="pt")
        encoded = model.encode(pixel_values["pixel_values"].to(model.device), output_sampling_locations=True)
        tracker.update(encoded.sampling_locations, encoded.attention_weights)
        all_tokens.append(encoded.image_tokens.cpu())
        progress_callback(len(encoded.image_tokens))
    if not all_tokens:
        raise ValueError("There are no images to encode.")
    image_tokens = torch.cat(all_tokens)
    codebook_size = model.config.codebook_size
    counts = image_tokens.flatten().bincount(minlength=codebook_size)
    by_position = torch.stack([position.bincount(minlength=codebook_size) for position in image_tokens.T])
    return TokenResult(
        len(image_tokens), counts, codebook_statistics(counts), entropy_bits(by_position), tracker.statistics()
    )


@dataclass
class AnchorAttention:
    """
    Where the anchors of a few images look in the encoder's last layer.

    Args:
        images (`list[PIL.Image.Image]`): as the model sees them.
        sampling_locations (`torch.Tensor` of shape `(images, num_anchors, heads, levels, points, 2)`): (x, y) in [0, 1]^2.
        attention_weights (`torch.Tensor` of shape `(images, num_anchors, heads, levels, points)`).
    """

    images: list[PIL.Image.Image]
    sampling_locations: torch.Tensor
    attention_weights: torch.Tensor


@torch.no_grad()
def anchor_attention(pipe: VFMTokPipeline, pictures: Sequence[Picture]) -> AnchorAttention:
    """Encode a few images and return where their anchors look."""
    pixel_values = pipe.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    encoded = pipe.vq_model.encode(pixel_values.to(pipe.vq_model.device), output_sampling_locations=True)
    images = pipe.image_processor.postprocess(pixel_values)
    return AnchorAttention(
        images, encoded.sampling_locations[-1].float().cpu(), encoded.attention_weights[-1].float().cpu()
    )
