"""The tokenizer and its losses as one module for DDP and torch.compile."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf.data.image_distances import LPIPS, vision_perceptual_loss
from vfmtok_hf.modeling.anchor_encoder_vfmtok import without_autocast
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


QUANTIZER_TERMS = ("codebook", "commitment", "entropy")


class TokenizerObjective(nn.Module):
    """
    `VFMTokModel` and its training losses. The vision features of an image are computed once and used by the encoder,
    the feature loss and the perceptual loss.

    Args:
        model (`VFMTokModel`): the tokenizer.
        weights (`dict[str, float]`): weights of the pixel losses: `l1`, `mse`, `lpips`, `perceptual` (distance
            between features of the frozen vision model). The weights of the model's own terms are in its configuration.
            Expensive terms of weight 0 are not computed. The original's pixel loss is `mse` 2.
        train_encoder (`bool`): False freezes everything up to the image tokens and trains only the decoders. Tokens are
            then computed in float32, as in inference.
        lpips (`LPIPS`, *optional*): required if its weight is above 0.
    """

    def __init__(
        self, model: VFMTokModel, weights: dict[str, float], train_encoder: bool = True, lpips: LPIPS | None = None
    ):
        super().__init__()
        self.model = model
        self.weights = weights
        self.train_encoder = train_encoder
        self.lpips = lpips
        self.feature_weight = model.config.feature_loss_weight
        # DDP waits for the gradient of every trainable parameter, so parameters without a loss are frozen.
        encoder = (model.anchor_encoder, model.quant_proj, model.quantizer)
        features = (
            model.vit_decoder.feature_mask_token,
            model.vit_decoder.feature_norm,
            model.vit_decoder.feature_head,
        )
        for part in encoder:
            part.requires_grad_(train_encoder)
        for part in features:
            part.requires_grad_(self.feature_weight > 0)

    def forward(self, pixel_values: torch.Tensor, quantize: bool = True) -> dict[str, Any]:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, image_size, image_size)`): in [-1, 1].
            quantize (`bool`): False bypasses the codebook and decodes the l2-normalized latents (warm-up).

        Returns:
            `loss` (the weighted sum), `image_loss` (the weighted sum of the pixel losses, for the adaptive adversarial
            weight), `terms` (by name; the quantizer's weighted, the others unweighted), `reconstruction`, `latents` and
            `image_tokens`. All losses are float32 under any autocast.
        """
        precision = nullcontext() if self.train_encoder else without_autocast(pixel_values.device)
        with precision, torch.set_grad_enabled(self.train_encoder):
            with torch.no_grad():
                vision_features = self.model.extract_vision_features(pixel_values)
            latents = self.model.encode_features(vision_features)
            quantized = self.model.quantizer(latents)
        memory = quantized.quantized_latents if quantize else F.normalize(latents.float(), dim=-1)
        decoded = self.model.decode(quantized_latents=memory, output_features=self.feature_weight > 0)
        reconstruction = decoded.reconstruction.float()

        terms = self._image_terms(reconstruction, pixel_values, vision_features)
        image_loss = sum(self.weights[name] * value for name, value in terms.items())
        loss = image_loss
        if self.feature_weight > 0:
            terms["feature"] = self.model.feature_loss(decoded.reconstructed_features, vision_features[-1])
            loss = loss + self.feature_weight * terms["feature"]
        if self.train_encoder:
            quantizer_terms = {name: quantized[f"{name}_loss"] for name in QUANTIZER_TERMS}
            # In the warm-up, they stay in the graph with weight 0, because DDP requires it.
            loss = loss + (1.0 if quantize else 0.0) * sum(quantizer_terms.values())
            terms |= quantizer_terms
        return {
            "loss": loss,
            "image_loss": image_loss,
            "terms": terms,
            "reconstruction": reconstruction,
            "latents": latents.detach(),
            "image_tokens": quantized.image_tokens,
        }

    def _image_terms(
        self, reconstruction: torch.Tensor, target: torch.Tensor, vision_features: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        terms = {"l1": F.l1_loss(reconstruction, target), "mse": F.mse_loss(reconstruction, target)}
        if self.weights["lpips"] > 0:
            terms["lpips"] = self.lpips(reconstruction, target).mean()
        if self.weights["perceptual"] > 0:
            reconstructed_features = self.model.extract_vision_features(reconstruction)
            terms["perceptual"] = vision_perceptual_loss(reconstructed_features, vision_features)
        return terms


@torch.no_grad()
def compile_objective(objective: TokenizerObjective) -> nn.Module:
    """Compile an objective on its final device, as one graph."""
    model = objective.model
    blank = torch.zeros(1, 3, model.config.image_size, model.config.image_size, device=model.device)
    # In their first forward pass, transformers' vision models install hooks, which would break the graph.
    model.extract_vision_features(blank)
    return torch.compile(objective)
