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


# Files whose tests fork processes that compute.
FORKING = ("tests/training/", "tests/benchmarks/test_plan_training.py", "tests/evaluation/test_killed_generation.py")

# Marks of whole files and folders.
MARKS = {
    "kernel": ("tests/test_hub_kernels.py",),
    "browser": (
        "tests/spaces/test_space_api.py",
        "tests/spaces/test_space_browser.py",
        "tests/spaces/test_web_browser.py",
    ),
    "train": ("tests/training/", "tests/benchmarks/test_plan_training.py", "tests/benchmarks/test_training_step.py"),
    "docs": (
        "tests/test_docs.py",
        "tests/test_docstrings.py",
        "tests/benchmarks/test_run_on_gpu.py",
        "tests/benchmarks/test_scripts.py",
        "tests/examples/test_claims_page.py",
        "tests/examples/test_notebooks.py",
    ),
    "process": (
        "tests/hub/test_endpoints.py",
        "tests/hub/test_loading.py",
        "tests/hub/test_portable.py",
        "tests/hub/test_pushes.py",
        "tests/serving/test_process.py",
        "tests/test_registration.py",
    ),
}


def pytest_collection_modifyitems(config, items):
    """
    Mark whole files, leave slow tests out unless they are asked for, and put those that fork first. Once torch has started
    autograd threads in a process, as a backward pass on tensors without values does, it refuses backward passes in all that
    are forked from it; no other test's doings are to reach these. Then come files that take minutes, for which no process is to
    wait at the end; not those of browsers, as Playwright leaves an event loop running.
    """
    for item in items:
        for mark, places in MARKS.items():
            if item.nodeid.startswith(places):
                item.add_marker(mark)
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and "slow" not in config.option.markexpr:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    long = (*MARKS["kernel"], *MARKS["docs"], *MARKS["process"])
    items.sort(key=lambda item: (not item.nodeid.startswith(FORKING), not item.nodeid.startswith(long)))
