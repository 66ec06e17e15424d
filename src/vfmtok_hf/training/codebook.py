"""Codebook initialization from data, replacement of unused rows, and codebook usage."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


class CodebookUsage:
    """
    Share of the codebook that occurs in the last `history_length` image tokens of training, as the original measures it
    (`VectorQuantizer.codebook_used`): a first-in-first-out history that starts as zeros, so early values count
    token 0 as seen. It also counts for how many steps each row was unused. Updates do not synchronize with the device.
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu", history_length: int = 65_536):
        self.codebook_size = codebook_size
        self.history = torch.zeros(history_length, dtype=torch.int64, device=device)
        self.idle_steps = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, image_tokens: torch.LongTensor) -> None:
        """Add the `image_tokens` of one step and all processes, in any shape."""
        tokens = image_tokens.detach().flatten()
        self.history = torch.cat([self.history, tokens])[-len(self.history) :]
        self.idle_steps += 1
        self.idle_steps.index_fill_(0, tokens, 0)

    def usage(self) -> float:
        """Distinct tokens in the history / codebook size, in (0, 1]."""
        return self.history.unique().numel() / self.codebook_size

    def state_dict(self) -> dict:
        return {"history": self.history, "idle_steps": self.idle_steps}

    def load_state_dict(self, state: dict) -> None:
        self.history.copy_(state["history"])
        self.idle_steps.copy_(state["idle_steps"])


@torch.no_grad()
def spherical_kmeans(
    vectors: torch.Tensor, num_clusters: int, generator: torch.Generator, iterations: int = 20
) -> torch.Tensor:
    """
    Spherical k-means: cluster centers under cosine similarity.

    Args:
        vectors (`torch.FloatTensor` of shape `(count, dim)`): not necessarily normalized; count >= num_clusters.
        num_clusters (`int`): number of centers.
        generator (`torch.Generator`): for the initial centers and for replacing empty clusters.

    Returns:
        `torch.FloatTensor` of shape `(num_clusters, dim)`: unit vectors.

    Raises:
        ValueError: there are fewer vectors than clusters.
    """
    if len(vectors) < num_clusters:
        raise ValueError(
            f"k-means needs at least {num_clusters} latents to initialize the codebook, got {len(vectors)}: "
            "use more images, more anchors or a smaller codebook_size."
        )
    vectors = F.normalize(vectors.float(), dim=-1)
    centers = vectors[torch.randperm(len(vectors), generator=generator)[:num_clusters].to(vectors.device)]
    for _ in range(iterations):
        nearest = (vectors @ centers.T).argmax(-1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, vectors)
        counts = torch.bincount(nearest, minlength=num_clusters)
        strays = vectors[torch.randint(len(vectors), (num_clusters,), generator=generator).to(vectors.device)]
        centers = torch.where((counts > 0)[:, None], F.normalize(sums, dim=-1), strays)
    return centers


@torch.no_grad()
def initialize_codebook(model: VFMTokModel, batches: Iterable[torch.Tensor], seed: int) -> None:
    """k-means over the latents of batches of `pixel_values`. Depends only on weights, images and seed."""
    latents = torch.cat([model.encode(batch.to(model.device)).latents.flatten(0, 1) for batch in batches])
    codebook = model.quantizer.codebook.weight
    codebook.copy_(spherical_kmeans(latents, len(codebook), torch.Generator().manual_seed(seed)))


@torch.no_grad()
def restart_dead_rows(
    codebook: torch.Tensor, usage: CodebookUsage, latents: torch.Tensor, patience: int, seed: int
) -> torch.Tensor:
    """
    Replace, in place, each codebook row that was unused for `patience` steps with the direction of a random current
    latent. With the same seed, all processes make the same choice. Does not synchronize with the device.

    Args:
        codebook (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): stored rows.
        latents (`torch.FloatTensor` of shape `(..., codebook_dim)`): this step's latents of all processes.

    Returns:
        `torch.LongTensor` of shape `()`: number of rows replaced.
    """
    latents = F.normalize(latents.float().flatten(0, -2), dim=-1)
    generator = torch.Generator(latents.device).manual_seed(seed)
    chosen = torch.randint(len(latents), (len(codebook),), generator=generator, device=latents.device)
    dead = usage.idle_steps >= patience
    codebook.copy_(torch.where(dead[:, None], latents[chosen].to(codebook), codebook))
    usage.idle_steps.masked_fill_(dead, 0)
    return dead.sum()
