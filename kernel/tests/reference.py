"""Multi-scale deformable attention in plain torch operators, the reference of the tests and benchmarks."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dev_build import KERNEL_DIR, variant_name


REPO_ID = "vfmtok-hf/vfmtok-msda"


def load_kernel(backend: str = "cpu"):
    """
    The build that LOCAL_KERNELS names, by the `kernels` library, else the one in kernel/build. That is an ordinary package,
    imported as such: machines with a GPU need not have the library.
    """
    if REPO_ID in os.environ.get("LOCAL_KERNELS", ""):
        from kernels import get_kernel

        return get_kernel(REPO_ID, version=1, backend=backend)
    folder = KERNEL_DIR / "build" / variant_name(backend)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no {folder}")
    name = f"vfmtok_msda_{backend}"
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights):
    """Same arguments and result as `ms_deform_attn`; half precision is sampled in float32, as there."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    sampled = []
    for index, (level, (height, width)) in enumerate(zip(levels, spatial_shapes, strict=True)):
        # batch, height * width, heads, channels -> batch * heads, channels, height, width
        images = level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        # batch, queries, heads, points, 2 -> batch * heads, queries, points, 2
        grid = (2 * sampling_locations[:, :, :, index].to(dtype) - 1).transpose(1, 2).flatten(0, 1)
        sampled.append(
            F.grid_sample(images.to(dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        )
    # batch * heads, channels, queries, levels * points
    samples = torch.stack(sampled, dim=-2).flatten(-2)
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    output = (samples * weights).sum(-1).to(value.dtype)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


def random_inputs(
    batch=2,
    queries=5,
    heads=3,
    channels=8,
    spatial_shapes=((4, 6), (3, 2)),
    points=4,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    margin=0.15,
):
    """`(value, sampling_locations, attention_weights)`; locations reach `margin` past the image on every side."""
    generator = torch.Generator().manual_seed(seed)
    positions = sum(height * width for height, width in spatial_shapes)
    levels = len(spatial_shapes)
    value = torch.randn(batch, positions, heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(batch, queries, heads, levels, points, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(batch, queries, heads, levels * points, generator=generator, dtype=torch.float64)
    weights = weights.softmax(-1).view(batch, queries, heads, levels, points)
    tensors = (value, locations * (1 + 2 * margin) - margin, weights)
    return tuple(tensor.to(device, dtype) for tensor in tensors)
