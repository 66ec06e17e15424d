"""
VFMAE, the continuous image autoencoder of VFMTok2: images to a grid of latents and back.

image -> frozen vision model, several feature levels -> anchor encoder (deformable cross-attention) -> bottleneck
-> latents -> ViT decoder -> pixel decoder -> image.

The computation follows https://github.com/CVMI-Lab/VFMTok2 (`tokenizer/vfmae`, Apache-2.0). It differs from VFMTok's in
that there is no codebook, that attention is bidirectional, and that the two branches of the ViT decoder have layers of
their own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel  # noqa: F401 - pipelines look it up here
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .anchor_encoder_vfmtok import VFMTokAnchorEncoder  # noqa: F401 - for the Hub, as CONTRIBUTING.md says
from .attention_vfmtok import eager_attention_forward  # noqa: F401 - likewise
from .autoencoder_config_vfmtok import AutoencoderConfigMixin  # noqa: F401 - likewise
from .autoencoder_vfmtok import VFMTokAutoencoder, runs_offload_hook
from .configuration_vfmae import VFMAEConfig
from .loading_vfmtok import CheckedModelMixin  # noqa: F401 - likewise
from .outputs_vfmtok import VFMTokModelOutput
from .pixel_decoder_vfmtok import VFMTokPixelDecoder
from .vision_features_vfmtok import class_and_patch_tokens
from .vit_decoder_vfmtok import VFMTokViTDecoderBase, VFMTokViTDecoderLayer, cosine_loss


@dataclass(repr=False)
class VFMAEEncoderOutput(VFMTokModelOutput):
    """
    Args:
        latents (`torch.FloatTensor` of shape `(batch_size, latent_channels, grid, grid)`):
            The encoder's output, not normalized. Denoisers work on the output of `normalize_latents`.
        sampling_locations (`tuple[torch.Tensor]`, one per encoder layer, with `output_sampling_locations=True`):
            Where each head looks, `(batch_size, num_anchors, heads, levels, points, 2)` as (x, y); the image is
            [0, 1]^2 and points outside it read zeros.
        attention_weights (`tuple[torch.Tensor]`, with `output_sampling_locations=True`):
            Weight of each location, `(batch_size, num_anchors, heads, levels, points)`, summing to 1 over levels and
            points.
        vision_features (`tuple[torch.Tensor]`, one per feature level, with `output_vision_features=True`):
            The frozen vision model's tokens, `(batch_size, 1 + patches, channels)`, class token first.
    """

    latents: torch.Tensor | None = None
    sampling_locations: tuple[torch.Tensor, ...] | None = None
    attention_weights: tuple[torch.Tensor, ...] | None = None
    vision_features: tuple[torch.Tensor, ...] | None = None


@dataclass(repr=False)
class VFMAEDecoderOutput(VFMTokModelOutput):
    """
    Args:
        reconstruction (`torch.FloatTensor` of shape `(batch_size, 3, image_size, image_size)`):
            The image, about [-1, 1], not clamped.
        reconstructed_features (`torch.FloatTensor` of shape `(batch_size, 1 + patches, vision_hidden_size)`):
            Prediction of the last vision feature level, class token first, with `output_features=True`.
    """

    reconstruction: torch.Tensor | None = None
    reconstructed_features: torch.Tensor | None = None


@dataclass(repr=False)
class VFMAEOutput(VFMTokModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            `feature_loss`: the part of the training objective that the model computes itself. The training script adds
            the losses on pixels.
        latents (`torch.FloatTensor` of shape `(batch_size, latent_channels, grid, grid)`):
            The latents. Without a loss they come first, which is where transformers' `image-feature-extraction` looks
            for features.
        reconstruction (`torch.FloatTensor` of shape `(batch_size, 3, image_size, image_size)`):
            The image, about [-1, 1], not clamped.
        feature_loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            Mean of 1 - cosine similarity between reconstructed and true features of the last vision level, multiplied by
            its weight.
    """

    loss: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    feature_loss: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Bottleneck


class VFMAEBottleneck(nn.Module):
    """Anchor states to latents. The norm's statistics run over all anchors of an image: a latent depends on all of them."""

    def __init__(self, config: VFMAEConfig):
        super().__init__()
        self.grid_size = config.anchor_grid_size
        self.norm = nn.GroupNorm(config.bottleneck_num_groups, config.hidden_size, eps=1e-6)
        self.conv = nn.Conv2d(config.hidden_size, config.latent_channels, 1)

    def forward(self, anchor_states: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_anchors, hidden_size)` -> `(batch_size, latent_channels, grid, grid)`, row by row."""
        # Contiguous, as the CPU's group norm is less accurate in channels-last layout.
        grid = anchor_states.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size)).contiguous()
        return self.conv(F.silu(self.norm(grid)))


# ---------------------------------------------------------------------------------------------------------------
# ViT decoder


class VFMAEViTDecoder(VFMTokViTDecoderBase):
    """
    Two transformers, one for each branch: every token sees the memory and all queries. The image branch's norm also serves
    the memory, in both branches.
    """

    def __init__(self, config: VFMAEConfig, feature_channels: int):
        super().__init__(config, feature_channels)
        self.feature_layers = nn.ModuleList(
            VFMTokViTDecoderLayer(config) for _ in range(config.feature_decoder_num_layers)
        )

    def forward(self, memory: torch.Tensor, output_features: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            memory (`torch.Tensor` of shape `(batch_size, num_anchors, hidden_size)`): the projected latents.
            output_features (`bool`): whether to run the feature branch.

        Returns:
            Image grid `(batch_size, hidden_size, side, side)`; reconstructed features `(batch_size, 1 + patches,
            channels)`, or None.
        """
        memory = self.image_norm(memory + self.anchor_position_embeddings)
        image_grid = self._to_grid(self._run_layers(self.layers, memory, self.image_queries()))
        if not output_features:
            return image_grid, None
        return image_grid, self.feature_head(self._run_layers(self.feature_layers, memory, self.feature_queries()))

    @staticmethod
    def _run_layers(layers: nn.ModuleList, memory: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Final states of `(1, length, hidden_size)` queries behind the memory."""
        hidden_states = torch.cat([memory, queries.expand(memory.shape[0], -1, -1)], dim=1)
        for layer in layers:
            hidden_states = layer(hidden_states)
        return hidden_states[:, memory.shape[1] :]


# ---------------------------------------------------------------------------------------------------------------
# Model


class VFMAEModel(VFMTokAutoencoder):
    """
    The continuous autoencoder: `encode` turns images into latents, `decode` turns latents into images. It is
    deterministic: there is no sampling of latents.

    The vision model is frozen: its parameters have no gradient and it stays in evaluation mode. The buffers `latents_mean`
    and `latents_std` `(latent_channels, grid, grid)` are statistics of the training images' latents, 0 and 1 until they
    are known.
    """

    config: VFMAEConfig
    latents_mean: torch.Tensor
    latents_std: torch.Tensor
    config_class = VFMAEConfig
    base_model_prefix = "vfmae"
    _keep_in_fp32_modules_strict = ["latents_mean", "latents_std"]

    def __init__(self, config: VFMAEConfig):
        super().__init__(config)
        self.bottleneck = VFMAEBottleneck(config)
        self.latent_proj = nn.Linear(config.latent_channels, config.hidden_size)
        self.vit_decoder = VFMAEViTDecoder(config, self.vision_channels[-1])
        self.pixel_decoder = VFMTokPixelDecoder(config)
        self.register_buffer("latents_mean", torch.zeros(config.latent_shape))
        self.register_buffer("latents_std", torch.ones(config.latent_shape))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.latents_mean)
            init.ones_(self.latents_std)

    # -- image -> latents

    def extract_vision_features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """
        Compute the frozen vision model's feature levels. Its parameters get no gradient, but `pixel_values` can, for
        perceptual losses.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): in [-1, 1], any size.

        Returns:
            `list[torch.Tensor]`: one `(batch_size, 1 + patches, channels)` per level, class token first; the last of
            them is what the feature branch reconstructs. A level that is the vision model's last block is normalized by
            the model's final norm.

        Raises:
            TypeError: images in place of `pixel_values`.
            ValueError: wrong shape or dtype, or a light checkpoint without its vision model.
        """
        return class_and_patch_tokens(self.vision_model, self.config, self._vision_input(pixel_values))

    def _feature_maps(self, vision_features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Input of the anchor encoder: each patch plus its level's class token, `(batch_size, channels, side, side)`."""
        side = self.config.feature_grid_size
        return [
            (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2).unflatten(2, (side, side)) for tokens in vision_features
        ]

    def encode_features(self, vision_features: list[torch.Tensor]) -> torch.Tensor:
        """
        Anchor encoder and bottleneck.

        Args:
            vision_features (`list[torch.Tensor]`): as of `extract_vision_features`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, latent_channels, grid, grid)`.
        """
        anchor_states, _, _ = self.anchor_encoder(self._feature_maps(vision_features))
        return self.bottleneck(anchor_states)

    @runs_offload_hook
    def encode(
        self,
        pixel_values: torch.Tensor,
        output_sampling_locations: bool = False,
        output_vision_features: bool = False,
    ) -> VFMAEEncoderOutput:
        """
        Images to latents.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): in [-1, 1], any size.
            output_sampling_locations (`bool`): also return where each anchor looked.
            output_vision_features (`bool`): also return the vision model's features.

        Raises:
            TypeError, ValueError: bad `pixel_values`, missing vision weights, or latents that are not finite.
        """
        vision_features = self.extract_vision_features(pixel_values)
        anchor_states, sampling_locations, attention_weights = self.anchor_encoder(self._feature_maps(vision_features))
        latents = self.bottleneck(anchor_states)
        if not torch.compiler.is_compiling() and not latents.isfinite().all():
            raise ValueError("The latents contain NaN or infinity: the input image or the weights are damaged.")
        return VFMAEEncoderOutput(
            latents=latents,
            sampling_locations=sampling_locations if output_sampling_locations else None,
            attention_weights=attention_weights if output_sampling_locations else None,
            vision_features=tuple(vision_features) if output_vision_features else None,
        )

    # -- statistics of the latents

    def normalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        `latents` `(batch_size, latent_channels, grid, grid)` with mean 0 and standard deviation 1 in each position of each
        channel, over the training images, in float32: what the denoiser works on (original: `compute_stats.py`).
        """
        mean, scale = self._latent_statistics(latents.device)
        return (latents.float() - mean) / scale

    def denormalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo `normalize_latents` of `latents`; the shape stays the same."""
        mean, scale = self._latent_statistics(latents.device)
        return latents.float() * scale + mean

    def _latent_statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of the latents, and what to divide by."""
        return self.latents_mean.to(device, torch.float32), self.latents_std.to(device, torch.float32) + 1e-5

    # -- latents -> image

    @runs_offload_hook
    def decode(self, latents: torch.Tensor, output_features: bool = False) -> VFMAEDecoderOutput:
        """
        Latents to images.

        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, latent_channels, grid, grid)`): as of `encode`, not
                normalized.
            output_features (`bool`): also return the feature branch's outputs.

        Raises:
            ValueError: wrong shape or dtype.
        """
        expected = self.config.latent_shape
        if latents.shape[1:] != expected or not latents.is_floating_point():
            raise ValueError(
                f"latents must be floating point of shape (batch_size, {', '.join(map(str, expected))}), got "
                f"{latents.dtype} of shape {tuple(latents.shape)}."
            )
        # batch_size, latent_channels, grid, grid -> batch_size, num_anchors, latent_channels
        latents = latents.flatten(2).transpose(1, 2).to(self.vit_decoder.cls_token.dtype)
        image_grid, reconstructed_features = self.vit_decoder(self.latent_proj(latents), output_features)
        return VFMAEDecoderOutput(
            reconstruction=self.pixel_decoder(image_grid), reconstructed_features=reconstructed_features
        )

    # -- round trip and losses

    @staticmethod
    def feature_loss(reconstructed_features: torch.Tensor, vision_features: torch.Tensor) -> torch.Tensor:
        """
        Mean of 1 - cosine similarity, scalar, without its weight.

        Args:
            reconstructed_features (`torch.Tensor` of shape `(batch_size, 1 + patches, channels)`).
            vision_features (`torch.Tensor` of shape `(batch_size, 1 + patches, channels)`): last level, the target.
        """
        return cosine_loss(reconstructed_features, vision_features)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, return_loss: bool = False) -> VFMAEOutput:
        """
        Images through latents and back: `encode`, then `decode`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): in [-1, 1], any size.
            return_loss (`bool`): also compute the model's own loss.
        """
        encoded = self.encode(pixel_values, output_vision_features=return_loss)
        decoded = self.decode(encoded.latents, output_features=return_loss)
        loss = None
        if return_loss:
            loss = self.feature_loss(decoded.reconstructed_features, encoded.vision_features[-1])
            loss = self.config.feature_loss_weight * loss
        return VFMAEOutput(
            loss=loss, latents=encoded.latents, reconstruction=decoded.reconstruction, feature_loss=loss
        )


__all__ = ["VFMAEModel"]
