"""The tokenizer and its losses as one module, so that DDP and torch.compile see a single object."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


def vision_perceptual_loss(reconstructed: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
    """
    Squared distance between channel-normalised features, mean over positions and levels, in [0, 4]. The form of
    LPIPS (Zhang et al. 2018, equation 1) without learned channel weights.

    Args:
        reconstructed, target (`list[torch.Tensor]`): one `(batch_size, channels, height, width)` per level.
    """
    distances = [
        (F.normalize(ours.float(), dim=1) - F.normalize(theirs.float(), dim=1)).square().sum(1).mean()
        for ours, theirs in zip(reconstructed, target, strict=True)
    ]
    return torch.stack(distances).mean()


class TokenizerObjective(nn.Module):
    """
    `VFMTokModel` and its training losses. The vision features of an image are computed once and serve the encoder,
    the feature loss and the perceptual loss.

    Args:
        model (`VFMTokModel`): the tokenizer.
        weights (`dict[str, float]`): weight of each term: `l1`, `mse`, `perceptual`, `feature`, `codebook` (the
            codebook, commitment and entropy losses together). A term of weight 0 is not computed where that saves
            work. The original's pixel loss is `mse` 2.
        train_encoder (`bool`): False keeps everything up to the image tokens fixed and trains the decoders only;
            tokens are then computed in float32, as a finished tokenizer computes them.
    """

    def __init__(self, model: VFMTokModel, weights: dict[str, float], train_encoder: bool = True):
        super().__init__()
        self.model = model
        self.weights = weights
        self.train_encoder = train_encoder
        for module in (model.anchor_encoder, model.quant_proj, model.quantizer):
            module.requires_grad_(train_encoder)

    def forward(self, pixel_values: torch.Tensor, quantize: bool = True) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, image_size, image_size)`): in [-1, 1].
            quantize (`bool`): False bypasses the codebook: the decoder gets the l2-normalised latents (warm-up).

        Returns:
            `dict[str, torch.Tensor]`: scalars `loss` (the weighted sum) and the unweighted terms, and `reconstruction`,
            `latents` and `image_tokens`.
        """
        precision = nullcontext() if self.train_encoder else torch.autocast(pixel_values.device.type, enabled=False)
        with precision, torch.set_grad_enabled(self.train_encoder):
            with torch.no_grad():
                vision_features = self.model.extract_vision_features(pixel_values)
            latents = self.model.encode_features(vision_features)
            quantized = self.model.quantizer(latents)
        memory = quantized.quantized_latents if quantize else F.normalize(latents.float(), dim=-1)
        decoded = self.model.decode(quantized_latents=memory, output_features=self.weights["feature"] > 0)
        reconstruction = decoded.reconstruction.float()

        terms = {"l1": F.l1_loss(reconstruction, pixel_values), "mse": F.mse_loss(reconstruction, pixel_values)}
        if self.weights["perceptual"] > 0:
            reconstructed_features = self.model.extract_vision_features(reconstruction)
            terms["perceptual"] = vision_perceptual_loss(reconstructed_features, vision_features)
        if self.weights["feature"] > 0:
            terms["feature"] = self.model.feature_loss(decoded.reconstructed_features, vision_features[-1])
        loss = sum(self.weights[name] * value for name, value in terms.items())
        if self.train_encoder:
            quantizer_terms = {name: quantized[f"{name}_loss"] for name in ("codebook", "commitment", "entropy")}
            # During the warm-up the terms stay in the graph with weight 0: DDP wants every parameter to be used.
            loss = loss + (self.weights["codebook"] if quantize else 0.0) * sum(quantizer_terms.values())
            terms |= quantizer_terms
        return {
            "loss": loss,
            **terms,
            "reconstruction": reconstruction,
            "latents": latents.detach(),
            "image_tokens": quantized.image_tokens,
        }
