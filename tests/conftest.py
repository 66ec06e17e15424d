import os
import shutil
import tempfile


# Before torch is imported: the suite's models are tiny, threads only cost, and nothing may reach for the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The cache of data sets is otherwise in the home folder.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Files whose tests fork processes that train.
FORKING = ("tests/training/", "tests/benchmarks/test_plan_training.py")


def pytest_collection_modifyitems(items):
    """
    They come first. Once torch has started autograd threads in a process, as a backward pass on tensors without values does, it
    refuses backward passes in all that are forked from it; no other test's doings are to reach these.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(FORKING))
