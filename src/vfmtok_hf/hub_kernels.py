"""
Compiled deformable attention, applied to models from outside. It is optional, and modeling files do not depend on it.

`enable_kernels` tries these sources in order and keeps the pure-PyTorch `forward` if none works:

1. a folder given as `path`,
2. the folder for `vfmtok-hf/vfmtok-msda` in the environment variable `LOCAL_KERNELS`,
3. `kernel/build` of a source checkout, the output of `make kernel`,
4. the Hub revision locked in `kernels.lock`,
5. on CUDA, `kernels-community/deformable-detr`.

A missing or broken source never raises an error: it is logged once, with its reason. Nothing is compiled, and nothing is
downloaded unless `download=True`.

`VFMTokPipeline`, and tokenizer training on CPUs, call `use_found_kernels`, which does the same unless the user called
`enable_kernels` or `disable_kernels` before.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from vfmtok_hf.modeling.modeling_vfmtok import MultiScaleDeformableAttention


LAYER_NAME = MultiScaleDeformableAttention.__name__
KERNEL_REPO_ID = "vfmtok-hf/vfmtok-msda"
COMMUNITY_REPO_ID = "kernels-community/deformable-detr"
COMMUNITY_VERSION = 1
LOCK_FILE = Path(__file__).with_name("kernels.lock")
CHECKOUT_KERNEL = Path(__file__).parents[2] / "kernel"

logger = logging.getLogger(__name__)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def enable_kernels(
    module_or_model: ModuleT,
    mode: Literal["inference", "training"] = "inference",
    *,
    device: str | torch.device | None = None,
    path: str | os.PathLike | None = None,
    download: bool = False,
) -> ModuleT:
    """
    Use the first compiled layer that works for every `MultiScaleDeformableAttention` in a model.

    The layer is recognized by its class name, so this also works for transformers' Deformable DETR models and for models
    loaded with `trust_remote_code=True`. Tensors on another device than `device` use pure PyTorch.

    Args:
        module_or_model (`torch.nn.Module`): a whole model or the one module.
        mode (`str`): `"training"` uses only layers with a backward pass.
        device (`str` or `torch.device`, *optional*): where the model will run. Defaults to the device of its parameters.
        path (path, *optional*): a kernel folder, such as `kernel/` or a variant folder of its `build/`.
        download (`bool`): whether a source may be downloaded from the Hub.

    Returns:
        `torch.nn.Module`: the argument.

    Raises:
        ValueError: `mode` is invalid.
    """
    if mode not in ("inference", "training"):
        raise ValueError(f'mode must be "inference" or "training", got {mode!r}')
    modules = _layers_of(module_or_model)
    device_type = torch.device(device).type if device is not None else _device_type(module_or_model)
    _bind_first_working(modules, mode, device_type, path, download)
    _remember_choice(modules, "the user's")
    return module_or_model


def use_found_kernels(module_or_model: ModuleT, device: str | torch.device) -> ModuleT:
    """
    Do what `enable_kernels` does, once per device, unless the user enabled or disabled kernels.

    Only layers with a backward pass are used, because the model might be trained.
    """
    device_type = torch.device(device).type
    modules = [module for module in _layers_of(module_or_model) if _choice(module) not in ("the user's", device_type)]
    _bind_first_working(modules, "training", device_type, path=None, download=False)
    _remember_choice(modules, device_type)
    return module_or_model


def disable_kernels(module_or_model: ModuleT) -> ModuleT:
    """
    Restore the pure-PyTorch `forward` of every `MultiScaleDeformableAttention` in `module_or_model`, a whole model or the one
    module. Returns the argument.
    """
    modules = _layers_of(module_or_model)
    for module in modules:
        module.__dict__.pop("forward", None)
    _remember_choice(modules, "the user's")
    return module_or_model


def active_implementation(module_or_model: nn.Module) -> str:
    """The implementation of a model's deformable attention: `"pure PyTorch"`, or `"compiled: "` and its source."""
    sources = {_source_of(module) for module in _layers_of(module_or_model)}
    return ", ".join(sorted(f"compiled: {source}" if source else "pure PyTorch" for source in sources)) or "none"


def kernel_facts(device: str | torch.device = "cpu") -> dict[str, str]:
    """The implementation that `enable_kernels` chooses on a device, and why earlier ones failed; for `vfmtok info`."""
    module = MultiScaleDeformableAttention()
    failures = _bind_first_working([module], "inference", torch.device(device).type, path=None, download=False)
    facts = {"deformable attention": active_implementation(module)}
    return facts | {f"  not {source}": reason for source, reason in failures.items()}


# ---------------------------------------------------------------------------------------------------------------
# Sources


class Source(NamedTuple):
    """A source of a compiled layer."""

    name: str
    load: Callable[[], type[nn.Module]]
    asked_for: bool  # by the user, who is warned if it fails


def _sources(device_type: str, path: str | os.PathLike | None, download: bool) -> Iterator[Source]:
    if path is not None:
        yield Source(str(path), lambda: _layer(_load_folder(Path(path), device_type)), asked_for=True)
    if local := _local_kernels_folder():
        name = f"LOCAL_KERNELS ({local})"
        yield Source(name, lambda: _layer(_load_folder(local, device_type)), asked_for=True)
    if (CHECKOUT_KERNEL / "build.toml").exists():
        name = f"this checkout ({CHECKOUT_KERNEL / 'build'})"
        yield Source(name, lambda: _layer(_load_folder(CHECKOUT_KERNEL, device_type)), asked_for=False)
    yield Source(
        KERNEL_REPO_ID,
        lambda: _layer(_load_locked(KERNEL_REPO_ID, device_type, download)),
        asked_for=download,
    )
    if device_type == "cuda":
        yield Source(
            COMMUNITY_REPO_ID,
            lambda: _community_layer(_layer(_load_community(download))),  # type: ignore[arg-type]
            asked_for=download,
        )


def _local_kernels_folder() -> Path | None:
    """The path of our kernel in LOCAL_KERNELS ("org/name=/path:org/other=/path")."""
    for entry in os.environ.get("LOCAL_KERNELS", "").split(":"):
        repo_id, _, folder = entry.partition("=")
        if repo_id == KERNEL_REPO_ID:
            return Path(folder)
    return None


def _layer(kernel: ModuleType) -> type[nn.Module]:
    return getattr(kernel.layers, LAYER_NAME)


def _load_folder(folder: Path, device_type: str) -> ModuleType:
    from kernels import get_local_kernel

    # Load a variant folder through its parent, which checks that its name matches this torch and this machine: a
    # library built for another torch could crash the process.
    root = folder.resolve().parent if (folder / "metadata.json").exists() else folder.resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    return _loaded_from(root, device_type) or get_local_kernel(root, backend=device_type)


def _loaded_from(root: Path, device_type: str) -> ModuleType | None:
    """
    The module of an identical build that was already loaded, if any, because operators cannot be registered twice.
    """
    from kernels import get_loaded_kernels

    builds = [
        json.loads(file.read_text()) for file in [*root.glob("*/metadata.json"), *root.glob("build/*/metadata.json")]
    ]
    identifiers = {build["id"] for build in builds if build["backend"]["type"] == device_type}
    return next((kernel.module for kernel in get_loaded_kernels() if kernel.metadata.id in identifiers), None)


def _locked_commit(repo_id: str) -> str | None:
    if not LOCK_FILE.exists():
        return None
    entries = json.loads(LOCK_FILE.read_text())
    return next((entry["lock"]["commit"] for entry in entries if entry["dependency"]["repo-id"] == repo_id), None)


def _load_locked(repo_id: str, device_type: str, download: bool) -> ModuleType:
    from kernels import get_kernel, load_kernel

    commit = _locked_commit(repo_id)
    if commit is None:
        raise FileNotFoundError("this release does not lock a revision")
    if download:
        # Installing this package implies trust in the commit that it pins.
        return get_kernel(repo_id, revision=commit, backend=device_type, trust_remote_code=[repo_id])
    return load_kernel(repo_id, lockfile=LOCK_FILE, backend=device_type)


def _load_community(download: bool) -> ModuleType:
    from kernels import get_kernel

    if _locked_commit(COMMUNITY_REPO_ID) is not None:
        return _load_locked(COMMUNITY_REPO_ID, "cuda", download)
    if not download:
        raise FileNotFoundError("not downloaded; enable_kernels(..., download=True) downloads it")
    return get_kernel(COMMUNITY_REPO_ID, version=COMMUNITY_VERSION, backend="cuda")


@functools.cache
def _community_layer(layer: type[nn.Module]) -> type[nn.Module]:
    """The community layer, extended to mixed dtypes, strided tensors and batch sizes that im2col_step does not divide."""

    class CommunityLayer(nn.Module):
        has_backward = True
        can_torch_compile = getattr(layer, "can_torch_compile", False)

        def forward(
            self,
            value: torch.Tensor,
            value_spatial_shapes: torch.Tensor,
            value_spatial_shapes_list: list[tuple[int, int]],
            level_start_index: torch.Tensor,
            sampling_locations: torch.Tensor,
            attention_weights: torch.Tensor,
            im2col_step: int,
        ) -> torch.Tensor:
            dtype = functools.reduce(
                torch.promote_types, (value.dtype, sampling_locations.dtype, attention_weights.dtype)
            )
            return layer.forward(
                self,
                value.to(dtype).contiguous(),
                value_spatial_shapes.contiguous(),
                value_spatial_shapes_list,
                level_start_index.contiguous(),
                sampling_locations.to(dtype).contiguous(),
                attention_weights.to(dtype).contiguous(),
                math.gcd(value.shape[0], im2col_step),
            )

    return CommunityLayer


# ---------------------------------------------------------------------------------------------------------------
# Binding


def _layers_of(module_or_model: nn.Module) -> list[nn.Module]:
    return [module for module in module_or_model.modules() if type(module).__name__ == LAYER_NAME]


def _device_type(module_or_model: nn.Module) -> str:
    parameter = next(module_or_model.parameters(), None)
    return parameter.device.type if parameter is not None else "cpu"


def _choice(module: nn.Module) -> str | None:
    """Who chose the module's implementation: `"the user's"` call, or `use_found_kernels` for the named device type."""
    return getattr(module, "_kernel_choice", None)


def _remember_choice(modules: list[nn.Module], choice: str) -> None:
    for module in modules:
        module._kernel_choice = choice  # type: ignore[assignment]


def _source_of(module: nn.Module) -> str | None:
    """The source of a module's compiled layer; `None` for pure PyTorch."""
    return getattr(module.forward, "kernel_source", None)


def _bind_first_working(
    modules: list[nn.Module], mode: str, device_type: str, path: str | os.PathLike | None, download: bool
) -> dict[str, str]:
    """Use the first source that works for the modules. Returns why earlier sources failed."""
    failures: dict[str, str] = {}
    if not modules:
        return failures
    for source in _sources(device_type, path, download):
        try:
            layer = _guarded_layer(source.load(), device_type, source.name)  # type: ignore[arg-type]
            for module in modules:
                _bind(module, layer, mode, device_type)
        except Exception as error:  # errors of another library must not reach the user's program
            reason = _one_line(error)
            failures[source.name] = reason
            level = logging.WARNING if source.asked_for else logging.INFO
            _log_once(level, f"no compiled deformable attention from {source.name}: {reason}")
            for module in modules:
                module.__dict__.pop("forward", None)
        else:
            _log_once(logging.INFO, f"deformable attention on {device_type} is compiled: {source.name}")
            break
    return failures


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "kernels":
        return "the kernels library is not installed (pip install 'vfmtok-hf[kernel]')"
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


@functools.cache
def _guarded_layer(layer: type[nn.Module], device_type: str, source: str) -> type[nn.Module]:
    """Use the compiled layer on its device, and the module's own `forward` elsewhere or if tracing needs it."""
    can_torch_compile = getattr(layer, "can_torch_compile", False)

    class GuardedLayer(nn.Module):
        def forward(
            self,
            value: torch.Tensor,
            value_spatial_shapes: torch.Tensor,
            value_spatial_shapes_list: list[tuple[int, int]],
            level_start_index: torch.Tensor,
            sampling_locations: torch.Tensor,
            attention_weights: torch.Tensor,
            im2col_step: int,
        ) -> torch.Tensor:
            fits = value.device.type == device_type and (can_torch_compile or not torch.compiler.is_compiling())
            return (layer if fits else type(self)).forward(
                self,
                value,
                value_spatial_shapes,
                value_spatial_shapes_list,
                level_start_index,
                sampling_locations,
                attention_weights,
                im2col_step,
            )

    GuardedLayer.can_torch_compile = True  # type: ignore[attr-defined]
    GuardedLayer.has_backward = getattr(layer, "has_backward", True)  # type: ignore[attr-defined]
    GuardedLayer.forward.kernel_source = source  # type: ignore[attr-defined]
    return GuardedLayer


@dataclass(frozen=True)
class _LoadedLayer:
    """The repository interface of `kernels.kernelize`, for a layer that is already loaded."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


def _bind(module: nn.Module, layer: type[nn.Module], mode: str, device_type: str) -> None:
    """
    Let `kernels` check the layer against the module and apply it to this instance only, not to other layers that `kernels`
    supports.
    """
    from kernels import Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    replace_kernel_forward_from_hub(type(module), LAYER_NAME)
    mapping: dict[str, dict[Any, Any]] = {LAYER_NAME: {device_type: _LoadedLayer(layer)}}
    kernel_mode = (Mode.TRAINING if mode == "training" else Mode.INFERENCE) | Mode.TORCH_COMPILE
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(module, mode=kernel_mode, device=device_type, use_fallback=False)
    if _source_of(module) is None:
        raise RuntimeError("kernels kept the original forward; is DISABLE_KERNEL_MAPPING set?")
