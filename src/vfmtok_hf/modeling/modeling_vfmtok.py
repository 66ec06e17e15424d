"""
The VFMTok image tokenizer: image tokens from a frozen vision foundation model (arXiv 2507.08441).

image -> frozen vision model, several feature levels -> anchor encoder (deformable cross-attention) -> quantizer
-> image tokens -> ViT decoder -> pixel decoder -> image.

The computation follows https://github.com/CVMI-Lab/VFMTok (Apache-2.0), which builds on Deformable DETR, VQGAN and
LlamaGen; the parity page of the documentation lists each deliberate difference.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel  # noqa: F401 - pipelines look it up here
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .anchor_encoder_vfmtok import (
    MultiScaleDeformableAttention as MultiScaleDeformableAttention,  # compiled layers look for it here
)
from .anchor_encoder_vfmtok import without_autocast
from .attention_vfmtok import eager_attention_forward  # noqa: F401 - for the Hub, as CONTRIBUTING.md says
from .autoencoder_config_vfmtok import AutoencoderConfigMixin  # noqa: F401 - likewise
from .autoencoder_vfmtok import VFMTokAutoencoder, runs_offload_hook
from .configuration_vfmtok import VFMTokConfig
from .loading_vfmtok import CheckedModelMixin  # noqa: F401 - likewise
from .outputs_vfmtok import VFMTokModelOutput
from .pixel_decoder_vfmtok import VFMTokPixelDecoder
from .vision_features_vfmtok import vision_features
from .vit_decoder_vfmtok import VFMTokViTDecoderBase, cosine_loss


@dataclass(repr=False)
class VFMTokEncoderOutput(VFMTokModelOutput):
    """
    Args:
        image_tokens (`torch.LongTensor` of shape `(batch_size, num_anchors)`):
            Index of the codebook row nearest to each latent, in [0, codebook_size).
        quantized_latents (`torch.FloatTensor` of shape `(batch_size, num_anchors, codebook_dim)`):
            Those rows, l2-normalized.
        latents (`torch.FloatTensor` of shape `(batch_size, num_anchors, codebook_dim)`):
            The anchor encoder's output before normalization and quantization.
        sampling_locations (`tuple[torch.Tensor]`, one per encoder layer, with `output_sampling_locations=True`):
            Where each head looks, `(batch_size, num_anchors, heads, levels, points, 2)` as (x, y); the image is
            [0, 1]^2 and points outside it read zeros.
        attention_weights (`tuple[torch.Tensor]`, with `output_sampling_locations=True`):
            Weight of each location, `(batch_size, num_anchors, heads, levels, points)`, summing to 1 over levels and
            points.
        vision_features (`tuple[torch.Tensor]`, one per feature level, with `output_vision_features=True`):
            The frozen vision model's features, `(batch_size, channels, height, width)`.
        codebook_loss, commitment_loss, entropy_loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            The quantizer's terms, multiplied by their weights.
    """

    image_tokens: torch.Tensor | None = None
    quantized_latents: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    sampling_locations: tuple[torch.Tensor, ...] | None = None
    attention_weights: tuple[torch.Tensor, ...] | None = None
    vision_features: tuple[torch.Tensor, ...] | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None


@dataclass(repr=False)
class VFMTokQuantizerOutput(VFMTokModelOutput):
    """
    Args:
        quantized_latents (`torch.FloatTensor` of shape `(batch_size, num_anchors, codebook_dim)`):
            Chosen codebook rows, l2-normalized; with `return_loss=True` with a straight-through gradient to the latents.
        image_tokens (`torch.LongTensor` of shape `(batch_size, num_anchors)`):
            Their indices.
        codebook_loss, commitment_loss, entropy_loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            Scalar terms, multiplied by their weights.
    """

    quantized_latents: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None


@dataclass(repr=False)
class VFMTokDecoderOutput(VFMTokModelOutput):
    """
    Args:
        reconstruction (`torch.FloatTensor` of shape `(batch_size, 3, image_size, image_size)`):
            The image, about [-1, 1], not clamped.
        reconstructed_features (`torch.FloatTensor` of shape `(batch_size, patches, vision_hidden_size)`):
            Prediction of the last vision feature level, with `output_features=True`.
        image_embeds (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
            CLS state of the feature branch, with `output_features=True`, for linear probes.
    """

    reconstruction: torch.Tensor | None = None
    reconstructed_features: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


@dataclass(repr=False)
class VFMTokOutput(VFMTokModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            Sum of the four terms below, which the model computes itself. The trainer adds the pixel losses (absolute and
            squared error, perceptual, adversarial).
        quantized_latents (`torch.FloatTensor` of shape `(batch_size, num_anchors, codebook_dim)`):
            The l2-normalized codebook rows of the image tokens, straight-through with `return_loss=True`. Without a
            loss they are the first field, which transformers' `image-feature-extraction` uses as features.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
            One embedding per image: `image_embeds` under the name that the same task uses with `pool=True`.
        reconstruction (`torch.FloatTensor` of shape `(batch_size, 3, image_size, image_size)`):
            The image, about [-1, 1], not clamped.
        image_tokens (`torch.LongTensor` of shape `(batch_size, num_anchors)`):
            Codebook indices.
        codebook_loss, commitment_loss, entropy_loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            The quantizer's terms, multiplied by their weights.
        feature_loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            Mean of 1 - cosine similarity between reconstructed and true features of the last vision level, multiplied by
            its weight.
    """

    loss: torch.Tensor | None = None
    quantized_latents: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    feature_loss: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Quantizer


def entropy_loss(similarities: torch.Tensor, temperature: float = 0.01) -> torch.Tensor:
    """
    Mean entropy of each latent's code distribution minus the entropy of their mean. It is small if each latent prefers one
    code and all codes are used.

    Args:
        similarities (`torch.Tensor` of shape `(latents, codebook_size)`): negative squared distances.

    Source: `compute_entropy_loss` of the original's `vq_model.py` (from LlamaGen).
    """
    logits = similarities / temperature
    probabilities = logits.softmax(-1)
    mean_probabilities = probabilities.mean(0)
    sample_entropy = -(probabilities * (logits + 1e-5).log_softmax(-1)).sum(-1).mean()
    mean_entropy = -(mean_probabilities * (mean_probabilities + 1e-5).log()).sum()
    return sample_entropy - mean_entropy


class VFMTokCodebook(nn.Embedding):
    """
    The codebook's rows, l2-normalized in float32. Training never renormalizes the stored ones.

    All reads go through `forward`, where accelerate's hooks load offloaded weights.
    """

    def forward(self, image_tokens: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """`(...)` indices -> `(..., codebook_dim)` rows; without indices all rows, `(codebook_size, codebook_dim)`."""
        rows = self.weight if image_tokens is None else F.embedding(image_tokens, self.weight)
        return F.normalize(rows.float(), dim=-1)


class VFMTokVectorQuantizer(nn.Module):
    """
    Quantize to the nearest l2-normalized codebook row (paper, section 3.2; original `VectorQuantizer`). Always in float32,
    because neighboring rows are closer than half precision can resolve.
    """

    def __init__(self, config: VFMTokConfig):
        super().__init__()
        self.config = config
        self.codebook = VFMTokCodebook(config.codebook_size, config.codebook_dim)

    def normalized_codebook(self) -> torch.Tensor:
        """`(codebook_size, codebook_dim)` l2-normalized rows."""
        return self.codebook()

    def lookup(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """`(...)` indices -> `(..., codebook_dim)` l2-normalized rows."""
        return self.codebook(image_tokens)

    def similarities(self, latents: torch.Tensor) -> torch.Tensor:
        """`(..., codebook_dim)` -> `(..., codebook_size)` cosine similarities; the nearest unit vector is the most similar one."""
        with without_autocast(latents.device):
            return F.normalize(latents.float(), dim=-1) @ self.codebook().T

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """`(..., codebook_dim)` -> `(...)` indices."""
        return self.similarities(latents).argmax(-1)

    def top_k(self, latents: torch.Tensor, k: int) -> torch.Tensor:
        """`(..., codebook_dim)` -> `(..., k)` indices of the `k` nearest rows, nearest first."""
        return self.similarities(latents).topk(k).indices

    def forward(self, latents: torch.Tensor, return_loss: bool = True) -> VFMTokQuantizerOutput:
        """Quantize `(batch_size, num_anchors, codebook_dim)` latents, not normalized, and compute loss terms."""
        with without_autocast(latents.device):
            latents = F.normalize(latents.float(), dim=-1)
            codebook = self.codebook()
            with torch.no_grad():
                image_tokens = (latents @ codebook.T).argmax(-1)
            quantized = F.embedding(image_tokens, codebook)
            if not return_loss:
                return VFMTokQuantizerOutput(quantized_latents=quantized, image_tokens=image_tokens)
            config = self.config
            return VFMTokQuantizerOutput(
                quantized_latents=latents + (quantized - latents).detach(),
                image_tokens=image_tokens,
                codebook_loss=config.codebook_loss_weight * F.mse_loss(quantized, latents.detach()),
                commitment_loss=config.commitment_loss_weight * F.mse_loss(latents, quantized.detach()),
                entropy_loss=self._entropy_loss(latents, codebook),
            )

    def _entropy_loss(self, latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        if self.config.entropy_loss_weight == 0:
            return latents.new_zeros(())
        negative_squared_distances = 2 * latents.flatten(0, 1) @ codebook.T - 2
        return self.config.entropy_loss_weight * entropy_loss(negative_squared_distances)


# ---------------------------------------------------------------------------------------------------------------
# ViT decoder


class VFMTokViTDecoder(VFMTokViTDecoderBase):
    """
    One causal transformer with two branches (paper, section 3.3). The anchors' memory is followed by the queries of the image
    branch, the feature branch, or both, which do not see each other. The memory's states are the same in both branches, so
    one pass computes both. The original's register tokens come last under a causal mask and have no effect, so they are
    left out.
    """

    def __init__(self, config: VFMTokConfig, feature_channels: int):
        super().__init__(config, feature_channels)
        self.register_buffer("register_tokens", torch.zeros(1, config.num_register_tokens, config.hidden_size))

    def image_position_embeddings(self) -> torch.Tensor:
        """Position table at the image branch's grid, `(1, 1 + image_grid_size ** 2, hidden_size)`, class entry first."""
        source, target = self.config.feature_grid_size, self.config.image_grid_size
        if source == target:
            return self.position_embeddings
        class_entry, table = self.position_embeddings.split([1, source**2], dim=1)
        table = table.view(1, source, source, -1).permute(0, 3, 1, 2)
        # The original adds 0.1 to the target side and so interpolates at that scale, which released weights need.
        table = F.interpolate(table, scale_factor=(target + 0.1) / source, mode="bicubic")
        return torch.cat([class_entry, table.flatten(2).transpose(1, 2)], dim=1)

    def forward(
        self, memory: torch.Tensor, output_image: bool = True, output_features: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            memory (`torch.Tensor` of shape `(batch_size, num_anchors, hidden_size)`): the projected quantized latents.
            output_image (`bool`): whether to run the image branch.
            output_features (`bool`):
                Whether to run the feature branch. With neither branch, only its CLS query runs, which comes first and does
                not depend on the others.

        Returns:
            Image grid `(batch_size, hidden_size, side, side)`; reconstructed features `(batch_size, patches, channels)`;
            CLS state of the feature branch `(batch_size, hidden_size)`. None for outputs that are not computed.
        """
        branches = [self.image_queries()] if output_image else []
        if output_features or not output_image:
            feature_queries = self.feature_queries()
            branches.append(feature_queries if output_features else feature_queries[:, :1])
        states = self._run_layers(memory, branches)
        image_grid = self._to_grid(states.pop(0)) if output_image else None
        if not states:
            return image_grid, None, None
        (features,) = states
        return image_grid, self.feature_head(features[:, 1:]) if output_features else None, features[:, 0]

    def _run_layers(self, memory: torch.Tensor, branches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Final states of each branch of queries, given the memory."""
        batch_size, num_anchors, _ = memory.shape
        # The image branch's norm is also applied to the memory, in both branches.
        memory = self.image_norm(memory + self.anchor_position_embeddings)
        hidden_states = torch.cat([memory, *(queries.expand(batch_size, -1, -1) for queries in branches)], dim=1)
        lengths = [num_anchors, *(queries.shape[1] for queries in branches)]
        for layer in self.layers:
            hidden_states = layer(hidden_states, lengths if len(branches) > 1 else None)
        return list(hidden_states.split(lengths, dim=1)[1:])


# ---------------------------------------------------------------------------------------------------------------
# Model


class VFMTokModel(VFMTokAutoencoder):
    """
    The image tokenizer. `encode` converts images to image tokens, and `decode` converts image tokens to images.

    The vision model is frozen: its parameters have no gradient, and it stays in evaluation mode.
    """

    config: VFMTokConfig
    config_class = VFMTokConfig
    base_model_prefix = "vfmtok"
    _keep_in_fp32_modules_strict = ["quantizer"]

    def __init__(self, config: VFMTokConfig):
        super().__init__(config)
        self._derive_feature_grid_size()
        self.quant_proj = nn.Linear(config.hidden_size, config.codebook_dim)
        self.quantizer = VFMTokVectorQuantizer(config)
        self.post_quant_proj = nn.Linear(config.codebook_dim, config.hidden_size)
        self.vit_decoder = VFMTokViTDecoder(config, self.vision_channels[-1])
        self.pixel_decoder = VFMTokPixelDecoder(config)
        self.post_init()

    def _derive_feature_grid_size(self) -> None:
        config, grid_size = self.config, self.vision_grid_size
        if config.feature_grid_size not in (None, grid_size):
            raise ValueError(
                f"feature_grid_size is {config.feature_grid_size}, but the vision model's last feature level has "
                f"{grid_size} positions per side for {config.vision_image_size} pixels. Leave it out to derive it."
            )
        config.feature_grid_size = grid_size

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VFMTokVectorQuantizer):
            bound = 1 / self.config.codebook_size
            init.uniform_(module.codebook.weight, -bound, bound)
            init.copy_(module.codebook.weight, F.normalize(module.codebook.weight, dim=-1))
        elif isinstance(module, VFMTokViTDecoder):
            init.zeros_(module.register_tokens)

    # -- image -> image tokens

    def extract_vision_features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """
        Compute the frozen vision model's feature levels. Its parameters get no gradient, but `pixel_values` can, for
        perceptual losses.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): in [-1, 1], any size.

        Returns:
            `list[torch.Tensor]`: one `(batch_size, channels, height, width)` per level. A level that is the vision
            model's last block is normalized by the model's final norm (original: `forward_features_levels`).

        Raises:
            TypeError: images were passed instead of `pixel_values`.
            ValueError: wrong shape or dtype, or the checkpoint has no vision weights.
        """
        return vision_features(self.vision_model, self.config, self._vision_input(pixel_values))

    def encode_features(self, vision_features: list[torch.Tensor]) -> torch.Tensor:
        """
        Apply the anchor encoder and the projection to the codebook's width.

        Args:
            vision_features (`list[torch.Tensor]`): returned by `extract_vision_features`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_anchors, codebook_dim)`: latents, not normalized.
        """
        anchor_states, _, _ = self.anchor_encoder(vision_features)
        return self.quant_proj(anchor_states)

    @runs_offload_hook
    def encode(
        self,
        pixel_values: torch.Tensor,
        output_sampling_locations: bool = False,
        output_vision_features: bool = False,
        return_loss: bool = False,
    ) -> VFMTokEncoderOutput:
        """
        Encode images to image tokens.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): in [-1, 1], any size.
            output_sampling_locations (`bool`): also return where each anchor looked.
            output_vision_features (`bool`): also return the vision model's features.
            return_loss (`bool`):
                Also compute the quantizer's loss terms; `quantized_latents` then carry a straight-through gradient.

        Raises:
            TypeError, ValueError: `pixel_values` are invalid, vision weights are missing, or latents are not finite.

        Example:

        ```python
        >>> from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokImageProcessor, VFMTokModel
        >>> model = VFMTokModel.from_pretrained(DEFAULT_CHECKPOINT, subfolder="vq_model")
        >>> processor = VFMTokImageProcessor.from_pretrained(DEFAULT_CHECKPOINT, subfolder="image_processor")
        >>> pixel_values = processor(PIL.Image.new("RGB", (80, 64)), return_tensors="pt")["pixel_values"]
        >>> model.encode(pixel_values).image_tokens.shape
        torch.Size([1, 144])
        ```
        """
        vision_features = self.extract_vision_features(pixel_values)
        anchor_states, sampling_locations, attention_weights = self.anchor_encoder(vision_features)
        latents = self.quant_proj(anchor_states)
        if not torch.compiler.is_compiling() and not latents.isfinite().all():
            raise ValueError("The latents contain NaN or infinity: the input image or the weights are damaged.")
        return VFMTokEncoderOutput(
            **self.quantizer(latents, return_loss),
            latents=latents,
            sampling_locations=sampling_locations if output_sampling_locations else None,
            attention_weights=attention_weights if output_sampling_locations else None,
            vision_features=tuple(vision_features) if output_vision_features else None,
        )

    # -- image tokens -> image

    @runs_offload_hook
    def decode(
        self,
        image_tokens: torch.Tensor | None = None,
        quantized_latents: torch.Tensor | None = None,
        output_features: bool = False,
    ) -> VFMTokDecoderOutput:
        """
        Decode image tokens, or their quantized latents, to images.

        Args:
            image_tokens (`torch.LongTensor` of shape `(batch_size, num_anchors)`): in [0, codebook_size).
            quantized_latents (`torch.FloatTensor` of shape `(batch_size, num_anchors, codebook_dim)`): unit vectors.
            output_features (`bool`): also return the feature branch's outputs.

        Raises:
            TypeError, ValueError: not exactly one of the two is passed, or its type, shape, dtype or range is wrong.

        Example:

        ```python
        >>> from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokModel
        >>> model = VFMTokModel.from_pretrained(DEFAULT_CHECKPOINT, subfolder="vq_model")
        >>> image_tokens = torch.randint(model.config.codebook_size, (1, model.config.num_anchors))
        >>> model.decode(image_tokens=image_tokens).reconstruction.shape
        torch.Size([1, 3, 64, 64])
        ```
        """
        memory = self._memory(image_tokens, quantized_latents)
        image_grid, reconstructed_features, image_embeds = self.vit_decoder(memory, output_features=output_features)
        return VFMTokDecoderOutput(
            reconstruction=self.pixel_decoder(image_grid),
            reconstructed_features=reconstructed_features,
            image_embeds=image_embeds,
        )

    def _memory(self, image_tokens: torch.Tensor | None, quantized_latents: torch.Tensor | None) -> torch.Tensor:
        if (image_tokens is None) == (quantized_latents is None):
            raise ValueError("Pass exactly one of image_tokens and quantized_latents.")
        if quantized_latents is None:
            self._check_image_tokens(image_tokens)
            quantized_latents = self.quantizer.lookup(image_tokens)
        elif not isinstance(quantized_latents, torch.Tensor):
            raise TypeError(f"quantized_latents must be a tensor, got {type(quantized_latents).__name__}.")
        elif quantized_latents.shape[1:] != (self.config.num_anchors, self.config.codebook_dim):
            raise ValueError(
                f"quantized_latents must have shape (batch_size, {self.config.num_anchors}, "
                f"{self.config.codebook_dim}), got {tuple(quantized_latents.shape)}."
            )
        return self.post_quant_proj(quantized_latents.to(self.post_quant_proj.weight.dtype))

    def _check_image_tokens(self, image_tokens: torch.Tensor) -> None:
        if not isinstance(image_tokens, torch.Tensor):
            raise TypeError(
                f"image_tokens must be a tensor, got {type(image_tokens).__name__}: convert with torch.as_tensor, or use "
                "VFMTokPipeline.detokenize, which accepts lists and arrays."
            )
        if image_tokens.dtype not in (torch.int64, torch.int32) or image_tokens.ndim != 2:
            raise ValueError(
                "image_tokens must be integers of shape (batch_size, num_anchors), got "
                f"{image_tokens.dtype} of shape {tuple(image_tokens.shape)}."
            )
        if image_tokens.shape[1] != self.config.num_anchors:
            raise ValueError(
                f"This model has {self.config.num_anchors} tokens per image, got {image_tokens.shape[1]}: "
                "tokens and model belong to different configurations."
            )
        # The range check synchronizes with the device, which a compiled graph cannot do.
        if not torch.compiler.is_compiling() and image_tokens.numel():
            low, high = image_tokens.aminmax()
            if low < 0 or high >= self.config.codebook_size:
                raise ValueError(
                    f"image_tokens must be in [0, {self.config.codebook_size}), got values from {low} to {high}."
                )

    @runs_offload_hook
    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, image_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        One embedding per image, computed from its image tokens alone: the feature branch's CLS state, as in the paper's
        linear probe.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`, *optional*):
                In [-1, 1], any size.
            image_tokens (`torch.LongTensor` of shape `(batch_size, num_anchors)`, *optional*):
                Tokens of the images, instead of `pixel_values`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, hidden_size)`.

        Raises:
            TypeError, ValueError: not exactly one of the two is passed, or as in `encode` and `decode`.

        Example:

        ```python
        >>> from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokModel
        >>> model = VFMTokModel.from_pretrained(DEFAULT_CHECKPOINT, subfolder="vq_model")
        >>> model.get_image_features(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 128])
        ```
        """
        if (pixel_values is None) == (image_tokens is None):
            raise ValueError("Pass exactly one of pixel_values and image_tokens.")
        if image_tokens is None:
            image_tokens = self.encode(pixel_values).image_tokens
        _, _, image_embeds = self.vit_decoder(self._memory(image_tokens, None), output_image=False)
        return image_embeds

    # -- round trip and losses

    @staticmethod
    def feature_loss(reconstructed_features: torch.Tensor, vision_features: torch.Tensor) -> torch.Tensor:
        """
        Mean of 1 - cosine similarity, scalar, without its weight.

        Args:
            reconstructed_features (`torch.Tensor` of shape `(batch_size, patches, channels)`).
            vision_features (`torch.Tensor` of shape `(batch_size, channels, height, width)`): last level, the target.
        """
        return cosine_loss(reconstructed_features, vision_features.flatten(2).transpose(1, 2))

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, return_loss: bool = False) -> VFMTokOutput:
        """
        Reconstruct images: `encode`, then `decode`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): in [-1, 1], any size.
            return_loss (`bool`): also compute the model's own loss terms; latents then pass the quantizer
                straight-through.

        Example:

        ```python
        >>> from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokModel
        >>> model = VFMTokModel.from_pretrained(DEFAULT_CHECKPOINT, subfolder="vq_model")
        >>> out = model(torch.zeros(1, 3, 64, 64), return_loss=True)
        >>> out.loss.backward()
        ```
        """
        encoded = self.encode(pixel_values, output_vision_features=return_loss, return_loss=return_loss)
        decoded = self.decode(quantized_latents=encoded.quantized_latents, output_features=True)
        loss = feature_loss = None
        if return_loss:
            feature_loss = self.feature_loss(decoded.reconstructed_features, encoded.vision_features[-1])
            feature_loss = self.config.feature_loss_weight * feature_loss
            loss = encoded.codebook_loss + encoded.commitment_loss + encoded.entropy_loss + feature_loss
        return VFMTokOutput(
            loss=loss,
            quantized_latents=encoded.quantized_latents,
            pooler_output=decoded.image_embeds,
            reconstruction=decoded.reconstruction,
            image_tokens=encoded.image_tokens,
            codebook_loss=encoded.codebook_loss,
            commitment_loss=encoded.commitment_loss,
            entropy_loss=encoded.entropy_loss,
            feature_loss=feature_loss,
        )


__all__ = ["VFMTokModel"]
