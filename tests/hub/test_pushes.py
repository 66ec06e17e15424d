"""Pushes."""

import functools
import hashlib
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from tests.conversion.originals import (
    AR,
    AR_CONFIG,
    DIT,
    LATENT_STATISTICS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VFMAE,
    VFMAE_DINOV2,
)
from tests.testing import REFERENCE, tiny_model
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.cli import app
from vfmtok_hf.conversion import convert_vfmae
from vfmtok_hf.hub import push, push_checkpoint, pushes, read_saved_model
from vfmtok_hf.hub.pushes import stage

from .conftest import Client
from .fake_hub import Repository
from .test_cards import FIGURE


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_push_is_one_commit_and_its_usage_snippets_run(folder, published, hub, client, tmp_path):
    client(
        f"""
        import numpy, PIL.Image
        from vfmtok_hf.hub import push
        PIL.Image.fromarray(numpy.zeros((40, 50, 3), numpy.uint8)).save("photo.png")
        print(push({str(folder)!r}, "tester/pushed", samples=3).summary())
        for name in ("tokenizer", "light", "ar", "rar"):
            push({str(published)!r} + "/" + name, "tester/pushed-" + name)
        """
    )
    repository = hub.repositories["tester/pushed"]
    assert len(repository.commits) == 2, "the Hub's own first, and the push"
    assert {"model_index.json", "samples.png", ".gitattributes"} <= repository.files.keys()
    card = repository.files["README.md"].decode()
    assert "![Samples of seeds 0 to 2, not cherry-picked, without guidance](samples.png)" in card
    checks = {
        "pushed": "image.size == (32, 32)",
        "pushed-tokenizer": "reconstruction.size == (32, 32)",
        "pushed-light": "reconstruction.size == (32, 32)",
        "pushed-ar": "image_tokens.shape == (1, 9)",
        "pushed-rar": "image_tokens.shape == (1, 9)",
    }
    with Client(hub, tmp_path, packaged=False) as bare:
        shutil.copy(REFERENCE / "tokenizer" / "images" / "b256_0.png", tmp_path / "elsewhere" / "photo.png")
        for name, check in checks.items():
            with_package, without_package = snippets(hub.repositories[f"tester/{name}"].files["README.md"].decode())
            assert f"tester/{name}" in with_package
            client(f"{with_package}\nassert {check}")
            bare(f"{without_package}\nassert {check}")


def test_failed_push_leaves_the_remote_as_it_was(folder, hub, client, faults):
    kept = {"vq_model/model-00009-of-00009.safetensors": b"stale", "notes.txt": b"mine"}
    repository = hub.repositories["tester/kept"] = Repository()
    repository.commit("first", dict(kept))
    for request, fault in {
        "POST .*/commit/main": 500,
        "POST .*/preupload/main": 403,
        "POST .*lfs/objects/batch": "cut",
        "PUT /store": 401,
        "POST /store": 404,
        "GET /api/models/tester/(kept|fresh)": "cut",
    }.items():
        faults[request] = fault
        for name in ("tester/kept", "tester/fresh"):
            hub.large_files.clear()
            printed = client(
                f"""
                from vfmtok_hf.hub import PushError, push
                try:
                    push({str(folder)!r}, {name!r})
                except PushError as error:
                    print(error)
                """
            )
            assert f"The push to {name} failed" in printed, request
            assert printed.count("\n") == 1, printed
        faults.clear()
        assert repository.files == kept, request
        # One that the push made is empty: the next push fills it.
        assert len(hub.repositories.get("tester/fresh", Repository()).commits) == 1, request
    client(
        f"from vfmtok_hf.hub import push\npush({str(folder)!r}, 'tester/kept')\npush({str(folder)!r}, 'tester/fresh')"
    )
    assert "vq_model/model-00009-of-00009.safetensors" not in repository.files, "stale weights go in the same commit"
    assert repository.files["notes.txt"] == b"mine"
    assert len(repository.commits) == 3
    assert len(hub.repositories["tester/fresh"].commits) == 2


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(folder, hub, client):
    hub.repositories["tester/busy"] = Repository()
    printed = client(
        f"""
        from huggingface_hub import CommitOperationAdd, HfApi
        from vfmtok_hf import hub

        listed = HfApi.list_repo_files
        def list_and_be_overtaken(self, repo_id, **options):
            HfApi.list_repo_files = listed
            HfApi().create_commit(repo_id, [CommitOperationAdd("theirs.txt", b"theirs")], commit_message="theirs")
            return listed(self, repo_id, **options)
        HfApi.list_repo_files = list_and_be_overtaken
        try:
            hub.push({str(folder)!r}, "tester/busy")
        except hub.PushError as error:
            print(error)
        """
    )
    assert "A commit has happened since" in printed
    assert "model_index.json" not in hub.repositories["tester/busy"].files


def test_everything_pushed_is_portable_even_if_the_folder_is_not():
    """The checkpoint in this package has no code beside it."""
    files = push(DEFAULT_CHECKPOINT, "me/emoji", dry_run=True).files
    assert {
        "pipeline.py",
        "pipeline_vfmtok.py",
        "vq_model/component_vfmtok.py",
        "vq_model/modeling_vfmtok.py",
    } <= files.keys()
    assert not any("__pycache__" in name for name in files)


def test_portable_code_of_a_push_is_what_save_pretrained_writes(folder, tmp_path):
    stage(read_saved_model(folder), tmp_path)
    files = [file.relative_to(folder) for file in folder.rglob("*.py")]
    assert files == [file.relative_to(tmp_path) for file in tmp_path.rglob("*.py")]
    assert all((tmp_path / file).read_text() == (folder / file).read_text() for file in files)


def test_pushing_leaves_the_folder_as_it_was(folder, tmp_path):
    """The staged repository has links to it, and files of its own in the place of some."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "samples.png").write_bytes(b"mine")
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    assert push(copy, "me/thing", samples=1, dry_run=True).files["samples.png"] > 4
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_pushes_of_clients_with_xet_are_one_commit(folder, hub, home, faults, monkeypatch):
    """There upload_folder is another implementation, which may split what it uploads."""
    monkeypatch.setattr(hub, "large_suffixes", ())  # so that files need no storage of Xet's
    environment = hub.environment(home) | {"HF_HUB_DISABLE_XET": "0"}
    monkeypatch.setattr(hub, "environment", lambda home: environment)
    repository = hub.repositories["tester/xet"] = Repository()
    repository.commit("first", {"vq_model/model-00009-of-00009.safetensors": b"stale", "notes.txt": b"mine"})
    with Client(hub, home) as client:
        faults["POST .*/commit/main"] = 500
        client(
            f"""
            import hf_xet
            from vfmtok_hf.hub import PushError, push
            try:
                push({str(folder)!r}, "tester/xet")
            except PushError:
                pass
            else:
                raise AssertionError
            """
        )
        assert len(repository.commits) == 2
        faults.clear()
        client(f"from vfmtok_hf.hub import push\npush({str(folder)!r}, 'tester/xet')")
    assert len(repository.commits) == 3
    assert "vq_model/model-00009-of-00009.safetensors" not in repository.files
    assert {"notes.txt", "model_index.json", "vq_model/model.safetensors"} <= repository.files.keys()


# -- original checkpoints


def test_converted_checkpoint_carries_provenance_and_the_authors_figures(hub, client, tmp_path):
    checkpoint = tmp_path / "originals" / "VFMTok-RAR" / "RAR-L-ultra" / "model.safetensors"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(REFERENCE / "rar" / "model.safetensors", checkpoint)
    client(f"from vfmtok_hf.hub import push_checkpoint\npush_checkpoint({str(checkpoint)!r}, 'tester/rar-l', 'rar')")
    files = hub.repositories["tester/rar-l"].files
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert json.loads(files["provenance.json"])["source sha256"] == sha256
    card = ModelCard(files["README.md"].decode())
    assert sha256 in card.text
    assert str(tmp_path) not in card.content
    assert card.data.base_model == "yexiguafu/VFMTok"
    figures = {(result.task_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert figures["generation, with guidance", "fid"] == 1.33
    assert figures["generation, without guidance", "fid"] == 2.01
    assert all("README of CVMI-Lab/VFMTok-RAR" in result.source_name for result in card.data.eval_results)
    assert (
        "| generation | without guidance | FID ↓ (inception) | ImageNet-1k 256 x 256, ADM's reference batch | 2.01 [1] | — |"
        in card.text
    )
    assert "modeling_vfmtok_rar.py" in files


def test_converted_generator_and_tokenizer_make_a_pipeline(published, tmp_path):
    torch.manual_seed(0)
    tokenizer = tiny_model(num_anchors=AR_CONFIG["num_image_tokens"], codebook_size=512)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shutil.copy(published / "tokenizer" / "preprocessor_config.json", tmp_path / "tokenizer")
    report = push_checkpoint(
        AR, "me/pipe", "ar", tokenizer=str(tmp_path / "tokenizer"), config=AR_CONFIG, dry_run=True, samples=2
    )
    assert {
        "model_index.json",
        "transformer/model.safetensors",
        "samples.png",
        "provenance.json",
    } <= report.files.keys()
    assert hashlib.sha256(AR.read_bytes()).hexdigest() in report.card
    assert str(tmp_path) not in report.card
    config = tmp_path / "config.json"
    config.write_text(json.dumps(AR_CONFIG))
    arguments = ["--config", config, "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "pipeline"]
    result = CliRunner().invoke(app, ["convert", "ar", "--checkpoint", str(AR), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "pipeline") in result.output.replace("\n", "")
    assert VFMTokPipeline.from_pretrained(tmp_path / "pipeline")(0, output_type="tokens").images.shape == (1, 16)
    assert (tmp_path / "pipeline" / "provenance.json").is_file()


def test_without_a_connection_it_says_so(folder, monkeypatch):
    monkeypatch.setattr(pushes, "HfApi", functools.partial(HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(pushes.PushError, match="the Hub cannot be reached"):
        pushes.push(folder, "me/thing", token="hf_none")


def test_a_released_diffusion_transformer_becomes_a_pipeline_with_its_autoencoder(tmp_path):
    config = {**TOKENIZER_CONFIG, "decoder_dropout": 0.0}
    convert_vfmae(
        VFMAE, tmp_path / "vfmae", vision_checkpoint=VFMAE_DINOV2, latent_statistics=LATENT_STATISTICS, config=config
    )
    released = tmp_path / "DiTDH-XL" / "DiTDH-XL_800e.pt"
    released.parent.mkdir()
    shutil.copy(DIT, released)
    report = push_checkpoint(released, "me/dit", "dit", tokenizer=str(tmp_path / "vfmae"), dry_run=True)
    assert {
        "dit_pipeline.py",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/model.safetensors",
        "transformer/modeling_vfmtok_dit.py",
        "vae/component_vfmtok.py",
        "image_processor/preprocessor_config.json",
    } <= report.files.keys()
    assert "from vfmtok_hf import VFMTokDiTPipeline" in report.card
    assert "with autoguidance" in report.card
    assert "| latents | 16 of 8 channels |" in report.card
    card = push(tmp_path / "vfmae", "me/vfmae", dry_run=True).card
    assert "VFMTokDiTPipeline.from_autoencoder" in card


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ar", {"vision_model": "x/y"}, "belongs to a tokenizer"),
        ("dit", {"vision_model": "x/y"}, "belongs to a tokenizer"),
        ("vfmae", {"tokenizer": "x/y"}, "belongs to a generator"),
        ("tokenizer", {"latent_statistics": "x"}, "belong to a VFMAE"),
        ("tokenizer", {"tokenizer": "x/y"}, "belongs to a generator"),
        ("rar", {}, "is no RAR|not a|kind|keys"),
    ],
)
def test_options_of_another_kind_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        push_checkpoint(TOKENIZER, "me/thing", kind, dry_run=True, **options)


# -- command line


def test_commands(folder, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    (tmp_path / "figures.json").write_text(json.dumps([FIGURE]))
    dry = run("push", folder, "me/thing", "--dry-run", "--metrics", tmp_path / "figures.json", "--license", "mit")
    assert dry.exit_code == 0, dry.output
    for shown in (
        "vq_model/model.safetensors",
        "nothing was uploaded (dry run)",
        "license: mit",
        "name: FID without guidance",
    ):
        assert shown in dry.stdout
    (tmp_path / "figures.json").write_text('[{"value": 1}]')
    for arguments, message in (
        ((folder / "nothing", "me/thing"), "pass the folder of a saved model"),
        ((folder, "me/thing", "--metrics", tmp_path / "figures.json"), "fields of a model-index"),
        ((folder, "me/thing", "--tokenizer", "a/b"), "go with --convert"),
    ):
        refused = run("push", *arguments, "--dry-run")
        assert refused.exit_code == 1
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
