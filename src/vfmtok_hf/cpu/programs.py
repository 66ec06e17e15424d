"""Settings of programs that do nothing but run models on a CPU."""

from torch import nn

from vfmtok_hf.cpu.packing import keep_freed_memory, pack_weights
from vfmtok_hf.cpu.threads import use_one_thread_for_small_models


def prepare_cpu_program(*models: nn.Module | None) -> None:
    """Pack the weights of `models`, and set this process's threads and memory for them. For programs, not for libraries."""
    keep_freed_memory()
    use_one_thread_for_small_models(*models)
    for model in models:
        if model is not None:
            pack_weights(model)


__all__ = ["prepare_cpu_program"]
