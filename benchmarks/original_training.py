"""
The original's training steps, for comparison: vq_train.py and train_c2i.py of CVMI-Lab/VFMTok and train_rar.py of
CVMI-Lab/VFMTok-RAR, reimplemented on the layers of our models.

The tokenizer's decoder makes two full passes, each over memory, queries and registers, under explicit masks. The entropy term,
the discriminator and its step are computed but multiplied by 0; the discriminator starts at step 20,000. Optimizers and
averages update one parameter at a time, except for the next-token generator's fused AdamW.
"""

import copy

import torch
import torch.nn.functional as F
from original_decode import rms_norm
from original_upsampling import original_upsampling
from torch import nn

from vfmtok_hf import VFMTokARForImageGeneration, VFMTokModel, VFMTokRARForImageGeneration
from vfmtok_hf.data.image_distances import LPIPS
from vfmtok_hf.modeling.class_embeddings_vfmtok import drop_labels
from vfmtok_hf.modeling.modeling_vfmtok import entropy_loss
from vfmtok_hf.modeling.rotary_vfmtok import apply_rotary, rotary_table
from vfmtok_hf.training.discriminator import DiscriminatorObjective


DECAY = 0.9999
BETAS = (0.9, 0.95)
HISTORY = 65_536


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module) -> None:
    """All parameters, frozen ones included."""
    averages = dict(average.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].mul_(DECAY).add_(parameter, alpha=1 - DECAY)


def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
    """Heads of `module` over `(batch_size, length, hidden_size)` states, before its output projection."""
    heads = [states.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for states in (query, key, value)]
    return F.scaled_dot_product_attention(*heads, **options).transpose(1, 2).flatten(2)


def squared_distances(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """`(latents, codebook_size)`: the distance of every latent to every row."""
    return latents.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * latents @ codebook.T


class OriginalLPIPS(nn.Module):
    """taming-transformers' lpips.py on our LPIPS's layers, in training mode as there."""

    def __init__(self, lpips: LPIPS):
        super().__init__()
        self.network = lpips.network

    def forward(self, reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        distances = 0.0
        network = self.network
        stages = (network.net(network.scaling_layer(images)) for images in (reconstruction, target))
        for ours, theirs, layer in zip(*stages, network.lins, strict=True):
            difference = (self.unit(ours) - self.unit(theirs)).square()
            distances = distances + layer(difference).mean((1, 2, 3))
        return distances

    @staticmethod
    def unit(features: torch.Tensor) -> torch.Tensor:
        return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


class OriginalTokenizerStep:
    """
    One training step on `pixel_values` `(batch_size, 3, height, width)` in [-1, 1], below step 20,000.

    Args:
        model (`VFMTokModel`): in training mode; its weights are trained.
        lpips (`torch.nn.Module`), discriminator (`DiscriminatorObjective`): the other networks.
        autocast (`bool`): compute in bfloat16 where autocast does.
    """

    def __init__(self, model: VFMTokModel, lpips: nn.Module, discriminator: DiscriminatorObjective, autocast: bool):
        self.model, self.lpips, self.discriminator, self.autocast = model, lpips, discriminator, autocast
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.judge = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.trainable, lr=1e-4, betas=BETAS)
        self.judge_optimizer = torch.optim.Adam(self.judge, lr=1e-4, betas=BETAS)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.used = torch.zeros(HISTORY, device=model.device)

    def __call__(self, pixel_values: torch.Tensor) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            loss, reconstruction = self.loss(pixel_values)
            loss = loss + 0.0 * F.softplus(-self.discriminator.discriminator(reconstruction)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        update_average(self.average, self.model)

        self.judge_optimizer.zero_grad()
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            verdict = 0.0 * self.discriminator(reconstruction.detach(), pixel_values)["discriminator"]
        verdict.backward()
        torch.nn.utils.clip_grad_norm_(self.judge, 1.0)
        self.judge_optimizer.step()

    def loss(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            vision_features = self.model.extract_vision_features(pixel_values)
        quantized, quantizer_loss = self.quantize(self.model.encode_features(vision_features))
        memory = self.model.post_quant_proj(quantized)
        with original_upsampling():
            reconstruction = self.model.pixel_decoder(self.decode_image(memory)).float()
        feature_loss = self.model.feature_loss(self.decode_features(memory), vision_features[-1])
        pixel_loss = 2 * F.mse_loss(reconstruction, pixel_values) + self.lpips(reconstruction, pixel_values).mean()
        return pixel_loss + quantizer_loss + feature_loss, reconstruction

    def quantize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute all distances and the term of weight 0, and update the history of used rows."""
        latents = F.normalize(latents.float(), dim=-1)
        codebook = self.model.quantizer.normalized_codebook()
        distances = squared_distances(latents.flatten(0, 1), codebook)
        image_tokens = distances.argmin(1)
        quantized = codebook[image_tokens].view_as(latents)
        self.used[: -len(image_tokens)] = self.used[len(image_tokens) :].clone()
        self.used[-len(image_tokens) :] = image_tokens.float()
        loss = F.mse_loss(quantized, latents.detach()) + 0.25 * F.mse_loss(latents, quantized.detach())
        return latents + (quantized - latents).detach(), loss + 0.0 * entropy_loss(-distances)

    def decode_image(self, memory: torch.Tensor) -> torch.Tensor:
        """`(batch_size, hidden_size, grid, grid)`, from a sequence of 702 tokens at the released size."""
        decoder = self.model.vit_decoder
        states = self.decode(memory, decoder.image_queries(), decoder.image_norm)
        return decoder._to_grid(states[:, : -decoder.config.num_register_tokens])

    def decode_features(self, memory: torch.Tensor) -> torch.Tensor:
        """`(batch_size, patches, channels)`, from a sequence of 837 tokens at the released size."""
        decoder = self.model.vit_decoder
        states = self.decode(memory, decoder.feature_queries(), decoder.feature_norm)
        return decoder.feature_head(states[:, 1 : -decoder.config.num_register_tokens])

    def decode(self, memory: torch.Tensor, queries: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        decoder = self.model.vit_decoder
        memory = decoder.image_norm(memory + decoder.anchor_position_embeddings)
        queries = torch.cat([queries, norm(decoder.register_tokens)], dim=1).expand(len(memory), -1, -1)
        states = torch.cat([memory, queries], dim=1)
        mask = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool, device=states.device).tril()
        for layer in decoder.layers:
            attention, normed = layer.self_attn, layer.self_attn_norm(states)
            projected = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
            attended = attend(attention, *projected, attn_mask=mask, dropout_p=attention.dropout)
            states = states + attention.o_proj(attended)
            states = states + layer.mlp(layer.mlp_norm(states))
        return states[:, memory.shape[1] :]


@torch.no_grad()
def nearest_two_tokens(model: VFMTokModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    `(batch_size, 3, height, width)` images to `(2 * batch_size, num_anchors)` tokens, the nearest and the second-nearest
    rows of each image, by sorting all distances, as in every step of VFMTok-RAR's training.
    """
    latents = F.normalize(model.encode(pixel_values).latents.float(), dim=-1).flatten(0, 1)
    two = squared_distances(latents, model.quantizer.normalized_codebook()).argsort(1)[:, :2]
    return two.view(len(pixel_values), -1, 2).transpose(1, 2).flatten(0, 1)


class OriginalARStep:
    """
    One training step of the next-token generator on class labels `(batch_size,)` and image tokens.

    Args:
        model (`VFMTokARForImageGeneration`): in training mode; its weights are trained.
        autocast (`bool`): compute in bfloat16 where autocast does.
    """

    def __init__(self, model: VFMTokARForImageGeneration, autocast: bool):
        self.model, self.autocast = model, autocast
        decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=BETAS, fused=True)
        self.average = copy.deepcopy(model).requires_grad_(False)

    def __call__(self, class_labels: torch.Tensor, image_tokens: torch.Tensor) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(class_labels, image_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_average(self.average, self.model)

    def loss(self, class_labels: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
        model, config = self.model, self.model.config
        labels = drop_labels(class_labels, config.class_dropout, config.num_classes)
        states = torch.cat([model.class_embedding(labels)[:, None], model.embed_tokens(image_tokens[:, :-1])], dim=1)
        states = model.token_dropout(states)
        positions = torch.arange(config.num_image_tokens, device=labels.device)
        table = rotary_table(positions, config.grid_size, config.head_dim, config.rope_theta)
        for layer in model.layers:
            attention, normed = layer.self_attn, rms_norm(states, layer.input_layernorm)
            query, key = (
                apply_rotary(states.unflatten(-1, (-1, config.head_dim)).transpose(1, 2), table)
                .transpose(1, 2)
                .flatten(2)
                for states in (attention.q_proj(normed), attention.k_proj(normed))
            )
            attended = attend(attention, query, key, attention.v_proj(normed), is_causal=True)
            states = states + attention.residual_dropout(attention.o_proj(attended))
            states = states + layer.mlp(rms_norm(states, layer.post_attention_layernorm))
        logits = model.lm_head(rms_norm(states, model.norm)).float()
        return F.cross_entropy(logits.flatten(0, 1), image_tokens.flatten())


class OriginalRARStep:
    """
    One training step of the randomized-order generator: the same graph as ours, an optimizer that is not
    fused, and no average.

    Args:
        model (`VFMTokRARForImageGeneration`): in training mode; its weights are trained.
        autocast (`bool`): compute in bfloat16 where autocast does.
    """

    def __init__(self, model: VFMTokRARForImageGeneration, autocast: bool):
        self.model, self.autocast = model, autocast
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.96), weight_decay=0.03)

    def __call__(self, class_labels: torch.Tensor, image_tokens: torch.Tensor) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(class_labels, image_tokens, return_loss=True, random_ratio=1.0).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
