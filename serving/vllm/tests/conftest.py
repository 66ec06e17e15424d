"""Engines in this process, and reference tokens from the environment of vfmtok-hf."""

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


# Before vLLM is imported. In one process, a test decides between which steps requests join.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB
os.environ["HF_HUB_OFFLINE"] = "1"

TESTS = Path(__file__).parent


def run_with_vfmtok(script: str, *arguments: str) -> str:
    """The output of a script that imports vfmtok-hf."""
    command = [os.environ["VFMTOK_PYTHON"], str(TESTS / script), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> dict:
    """By checkpoint: its folder, its tokens, and those with guidance."""
    folder = tmp_path_factory.mktemp("references")
    run_with_vfmtok("references.py", str(folder))
    return json.loads((folder / "references.json").read_text(encoding="utf-8"))


@contextmanager
def engine(folder: str, **options):
    """vLLM on a checkpoint, in float32. It is not compiled unless the test says so."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 32, "enforce_eager": True}
    llm = LLM(folder, **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def prompt(llm, label: int) -> dict:
    """The prompt of a class."""
    config = llm.model_config.hf_config
    return {"prompt_token_ids": [config.codebook_size + label] * config.num_condition_tokens}


def sampling(llm, **options):
    """Parameters of an image, greedy unless `options` say otherwise."""
    from vllm import SamplingParams

    length = llm.model_config.hf_config.num_image_tokens
    fixed = {"min_tokens": length, "max_tokens": length, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{"temperature": 0.0, **fixed, **options})


def draw_all(llm) -> list[list[int]]:
    """Greedy tokens of every class, in one batch."""
    prompts = [prompt(llm, label) for label in range(llm.model_config.hf_config.num_classes)]
    outputs = llm.generate(prompts, sampling(llm), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
