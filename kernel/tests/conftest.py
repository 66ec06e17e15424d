import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent))

from reference import load_kernel


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_configure(config):
    config.addinivalue_line("markers", "kernel: needs a compiled kernel build")
    config.addinivalue_line("markers", "kernels_ci: the subset that kernel-builder's CI runs")


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="session")
def msda(device):
    """The kernel for the device; skips with the loader's reason when there is no build."""
    try:
        return load_kernel(device)
    except FileNotFoundError as error:
        pytest.skip(f"{error} (kernel/dev_build.py builds it)")
