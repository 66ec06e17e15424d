"""What a folder holds, and what of it belongs to the model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.pipelines.tiny_pipeline import tiny_dit_pipeline
from vfmtok_hf.hub import push, read_saved_model


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")


# What Trainer, Accelerate, DeepSpeed and Lightning leave beside a model, and what people keep there.
LEFTOVERS = [
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
    "trainer_state.json", "all_results.json", "optimizer.bin", "sampler.bin", "random_states_0.pkl",
    "custom_checkpoint_0.pkl", "model_1.safetensors", "ema.safetensors", "pytorch_model.bin", "latest", "zero_to_fp32.py",
    "global_step40/mp_rank_00_model_states.pt", "global_step40/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "pytorch_model_fsdp_0/__0_0.distcp", "last.ckpt", "hparams.yaml", "lightning_logs/version_0/metrics.csv",
    "checkpoint-40/model.safetensors", "checkpoint-40/config.json", "runs/events.out.tfevents.1", "wandb/run.json",
    "log.jsonl", "vq_model/optimizer.pt", "transformer/samples.png", "tokens.npy",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "tokenizer", "ar"])
def test_the_state_of_trainers_does_not_belong_to_a_model(published, tmp_path, kind):
    folder = shutil.copytree(published / kind, tmp_path / kind)
    before = push(folder, "me/thing", dry_run=True)
    assert before.left_out == []
    put(folder, *LEFTOVERS)
    after = push(folder, "me/thing", dry_run=True)
    assert after.files == before.files
    assert after.left_out == sorted(name for name in LEFTOVERS if not name.endswith(".py") and "/__" not in name)
    assert "left out because they are not part of the model: all_results.json" in after.summary()


def test_documents_belong_to_a_model(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "model")
    documents = {"LICENSE", "LICENSE.txt", "NOTICE", "ATTRIBUTION.md", "provenance.json", "grid.PNG", "CITATION.cff"}
    put(folder, *documents)
    assert documents <= push(folder, "me/thing", dry_run=True).files.keys()


def test_an_index_beside_whole_weights_is_a_stale_one(folder, tmp_path):
    """Loading takes the whole file. The shards need not exist any more."""
    folder = shutil.copytree(folder, tmp_path / "model")
    model = folder / "vq_model"
    stale = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(stale))
    save_file({"a": torch.zeros(2)}, model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.bf16.json").write_text(json.dumps(stale))
    save_file({"a": torch.zeros(2)}, model / "model.bf16.safetensors")
    assert read_saved_model(folder).num_weights == read_saved_model(folder.with_name("model")).num_weights
    report = push(folder, "me/thing", dry_run=True)
    assert {name for name in report.files if name.startswith("vq_model/model")} - {"vq_model/modeling_vfmtok.py"} == {
        "vq_model/model.safetensors", "vq_model/model.bf16.safetensors",
    }  # fmt: skip
    assert len(report.left_out) == 3


def test_shards_that_no_index_names_are_left_out(published, tmp_path):
    folder = shutil.copytree(published / "pipe", tmp_path / "pipe")
    expected = read_saved_model(folder)
    save_file({"a": torch.zeros(2)}, folder / "transformer" / "model-00099-of-00099.safetensors")
    saved = read_saved_model(folder)
    assert saved.num_weights == expected.num_weights
    assert saved.files.keys() == expected.files.keys()
    assert "transformer/model.safetensors.index.json" in saved.files


def truncate(file):
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda folder: (folder / "model_index.json").unlink(),
            FileNotFoundError,
            "neither model_index.json nor config",
        ),
        (lambda folder: truncate(folder / "vq_model" / "model.safetensors"), ValueError, "damaged or truncated"),
        (lambda folder: (folder / "transformer" / "model.safetensors").unlink(), FileNotFoundError, "is missing"),
        (lambda folder: shutil.rmtree(folder / "vq_model"), FileNotFoundError, "vq_model.config.json is missing"),
        (lambda folder: (folder / "vq_model" / "config.json").write_text("{"), ValueError, "not JSON"),
    ],
)
def test_incomplete_folders_are_refused_before_anything_is_sent(folder, tmp_path, damage, error, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(error, match=message):
        push(copy, "me/thing")


def test_a_pipeline_without_its_scheduler_is_refused(tmp_path):
    tiny_dit_pipeline().save_pretrained(tmp_path)
    assert "scheduler/scheduler_config.json" in read_saved_model(tmp_path).files
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="scheduler_config.json is missing"):
        read_saved_model(tmp_path)


def test_foreign_models_bad_names_and_impossible_samples_are_refused(folder, published, tmp_path):
    alone = shutil.copytree(published / "tokenizer", tmp_path / "alone")
    (alone / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="save a VFMTokImageProcessor there"):
        push(alone, "me/thing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        push(tmp_path, "me/thing")
    with pytest.raises(ValueError, match="me/thing/else"):
        push(folder, "me/thing/else")
    with pytest.raises(ValueError, match="Samples need a pipeline"):
        push(published / "ar", "me/thing", samples=4)
