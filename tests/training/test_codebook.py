import pytest
import torch
import torch.nn.functional as F

from vfmtok_hf.training.codebook import CodebookUsage, restart_dead_rows, spherical_kmeans


def test_kmeans_finds_separate_clusters():
    centers = F.normalize(torch.eye(4) + 0.1, dim=-1)
    vectors = F.normalize(centers.repeat_interleave(50, 0) + 0.02 * torch.randn(200, 4), dim=-1)
    found = spherical_kmeans(vectors, 4, torch.Generator().manual_seed(3))
    similarity = found @ centers.T
    assert sorted(similarity.argmax(1).tolist()) == [0, 1, 2, 3]
    assert similarity.amax(1).min() > 0.999
    with pytest.raises(ValueError, match="at least 201"):
        spherical_kmeans(vectors, 201, torch.Generator())


def test_restart_replaces_exactly_the_idle_rows():
    codebook, usage = torch.zeros(5, 3), CodebookUsage(5, history_length=10)
    for _ in range(4):
        usage.update(torch.tensor([0, 3]))
    latents = torch.randn(2, 6, 3)
    assert restart_dead_rows(codebook, usage, latents, patience=4, seed=0) == 3
    assert torch.equal(codebook[[0, 3]], torch.zeros(2, 3))
    directions = F.normalize(latents.flatten(0, 1), dim=-1)
    for row in codebook[[1, 2, 4]]:
        assert (directions == row).all(-1).any()
    assert usage.idle_steps.tolist() == [0, 0, 0, 0, 0]
