"""Cards, and pushes that happen whole or not at all."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from tests.conversion.originals import AR, AR_CONFIG, TOKENIZER
from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.testing import REFERENCE, tiny_model
from vfmtok_hf import DEFAULT_CHECKPOINT
from vfmtok_hf.cli import app
from vfmtok_hf.evaluation.results import measured_results, published_results, save_measurement
from vfmtok_hf.hub import model_card, push, push_checkpoint
from vfmtok_hf.hub.released_checkpoints import RELEASED_CHECKPOINTS, publish_plan

from .conftest import Client
from .fake_hub import Repository


FIGURE = {
    "metric_type": "fid",
    "metric_name": "FID without guidance",
    "metric_value": 2.04,
    "dataset_type": "imagenet-1k",
    "dataset_name": "ImageNet 256 x 256",
    "source_name": "measured",
    "source_url": "https://example.com",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe")
    torch.manual_seed(0)
    tiny_pipeline().save_pretrained(folder)
    return folder


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# -- cards


def test_card_says_what_the_hub_reads(folder):
    card = model_card(folder, "me/thing", license="mit", base_model="a/b", metrics=[FIGURE])
    data = ModelCard(str(card)).data  # as the Hub parses it
    assert (data.license, data.base_model, data.library_name) == ("mit", "a/b", "diffusers")
    (result,) = data.eval_results
    assert (result.metric_name, result.metric_value, result.source_name) == ("FID without guidance", 2.04, "measured")
    assert "| FID without guidance | 2.04 | ImageNet 256 x 256 | measured |" in card.text
    assert "# thing" in card.text
    assert "@article{zheng2025vfmtok" in card.text
    assert not re.search(r"[{}]{2}|None|\n\n\n", card.text)


def test_card_never_mixes_published_and_measured(folder, tmp_path):
    """The same quantity has one row with two columns; other data have a row of their own, empty where nothing is published."""
    for name, dataset in (("same", "ImageNet-1k 256 x 256, ADM's reference batch"), ("other", "emoji")):
        save_measurement(
            tmp_path / f"{name}.json", "generation", "without guidance", dataset, {"fid": 2.5}, {"features": "inception"},
            num_images=50_000,
        )  # fmt: skip
    measured = [figure for name in ("same", "other") for figure in measured_results(tmp_path / f"{name}.json")]
    card = model_card(folder, "me/thing", results=[*published_results("vfmtok-l"), *measured])
    rows = [line.split(" | ")[2:] for line in card.text.splitlines() if "| without guidance | FID ↓" in line]
    assert rows == [
        ["FID ↓ (inception)", "ImageNet-1k 256 x 256, ADM's reference batch", "2.15 [1], 2.11 [2]", "2.5 [3] |"],
        ["FID ↓ (inception)", "emoji", "—", "2.5 [3] |"],
    ]
    of_card = ModelCard(str(card)).data.eval_results  # as the Hub parses it
    sources = {(result.metric_value, (result.source_name or "none")[:5]) for result in of_card}
    assert {(2.15, "READM"), (2.11, "arXiv"), (2.5, "none")} <= sources
    assert len([value for value, _ in sources if value == 2.5]) == 1
    assert not re.search(r"[{}]{2}|None|\n\n\n", card.text)


def test_card_counts_what_the_weights_hold(folder):
    pipe = tiny_pipeline()
    total = sum(
        tensor.numel() for model in (pipe.vq_model, pipe.transformer) for tensor in model.state_dict().values()
    )
    assert f"| weights | {total:,} |" in model_card(folder, "me/thing").text


def test_card_shows_the_pictures_of_the_folder(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    Image.new("RGB", (8, 8)).save(copy / "held_out_images.png")
    assert "![held out images](held_out_images.png)" in model_card(copy, "me/thing").text


def test_card_without_figures_and_pictures_has_no_empty_sections(published):
    card = model_card(published / "tokenizer", "me/thing")
    assert "## Metrics" not in card.text
    assert "![" not in card.text
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "model-index" not in str(card)


def test_existing_cards_are_published_as_they_are():
    report = push(DEFAULT_CHECKPOINT, "me/emoji", dry_run=True)
    assert "# Emoji: the checkpoint that comes with vfmtok-hf" in report.card


# -- pushes


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
    assert "![Samples of seeds 0 to 2, none picked, without guidance](samples.png)" in card
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
        if request.startswith("GET"):  # then its answers to the clean-up are cut, too
            assert hub.repositories.pop("tester/fresh", None) is None or "remains" in printed
        assert "tester/fresh" not in hub.repositories, request
    client(f"from vfmtok_hf.hub import push\npush({str(folder)!r}, 'tester/kept')")
    assert "vq_model/model-00009-of-00009.safetensors" not in repository.files, "stale weights go in the same commit"
    assert repository.files["notes.txt"] == b"mine"
    assert len(repository.commits) == 3


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(folder, hub, client):
    hub.repositories["tester/busy"] = Repository()
    printed = client(
        f"""
        from huggingface_hub import CommitOperationAdd, HfApi
        from vfmtok_hf import hub

        listed = HfApi.list_repo_files
        def list_and_be_overtaken(self, repo_id):
            HfApi.list_repo_files = listed
            HfApi().create_commit(repo_id, [CommitOperationAdd("theirs.txt", b"theirs")], commit_message="theirs")
            return listed(self, repo_id)
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


def test_portable_code_of_a_push_is_what_save_pretrained_writes(folder):
    from vfmtok_hf.hub.publishing import _contents, read_saved_model

    written = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
    contents = _contents(read_saved_model(folder))
    assert {name for name in contents if name.endswith(".py")} == written.keys()
    assert all(contents[name].decode() == file.read_text() for name, file in written.items())


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


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ar", {"vision_model": "x/y"}, "belongs to a tokenizer"),
        ("tokenizer", {"tokenizer": "x/y"}, "belongs to a generator"),
        ("rar", {}, "is no RAR|not a|kind|keys"),
    ],
)
def test_options_of_another_kind_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        push_checkpoint(TOKENIZER, "me/thing", kind, dry_run=True, **options)


# -- bad input


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
    with pytest.raises(ValueError, match="drawn by pipelines"):
        push(published / "ar", "me/thing", samples=4)


# -- the released checkpoints


def test_plan_covers_every_released_file():
    plan = publish_plan("org")
    assert len(plan) == len(RELEASED_CHECKPOINTS) == 14
    tokenizer, ar = plan[0], plan[1]
    assert (tokenizer.target, round(tokenizer.target_bytes / 1e9, 1)) == ("org/VFMTok-DINOv2-L", 1.5)
    assert "--vision-model facebook/dinov2-with-registers-large" in tokenizer.commands[1]
    assert "--convert ar --tokenizer org/VFMTok-DINOv2-L" in ar.commands[1]
    assert sum(row.target is None for row in plan) == 3


def test_sizes_of_the_plan_are_those_of_the_models():
    counts = json.loads((REFERENCE / "manifests" / "parameter_counts.json").read_text())
    names = {"VFMTok-DINOv2-L": "tokenizer_vq16", "VFMTok-RAR-L-ultra": "RAR-L"}
    for row in RELEASED_CHECKPOINTS:
        if row.kind is not None:
            name = names.get(row.name) or row.name.replace("VFMTok-AR-", "GPT-").replace("VFMTok-", "")
            assert row.num_parameters == counts[name]["total"], row.name


def test_sizes_of_the_originals_come_from_the_hub(hub, client, faults):
    repository = hub.repositories["yexiguafu/VFMTok"] = Repository()
    repository.commit("release", {RELEASED_CHECKPOINTS[1].source: bytes(1234)})
    client(
        """
        from vfmtok_hf.hub.released_checkpoints import publish_plan
        sizes = [row.source_bytes for row in publish_plan("org", ask_hub=True)]
        assert sizes == [None, 1234] + [None] * 12, sizes
        """
    )
    faults["paths-info"] = "cut"
    client(
        """
        from vfmtok_hf.hub.released_checkpoints import publish_plan
        try:
            publish_plan("org", ask_hub=True)
        except OSError as error:
            assert "yexiguafu/VFMTok cannot be read" in str(error), str(error)
        else:
            raise AssertionError
        """
    )


# -- command line


def test_commands(folder, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    plan = run("publish-plan", "org")
    assert (
        "VFMTok-RAR/RAR-vanilla/vfmtok-rar-xxl.safetensors (size not asked) -> org/VFMTok-RAR-XXL (7.7 GB)"
        in plan.stdout
    )
    (tmp_path / "figures.json").write_text(json.dumps([FIGURE]))
    dry = run("push", folder, "me/thing", "--dry-run", "--metrics", tmp_path / "figures.json", "--license", "mit")
    assert dry.exit_code == 0, dry.output
    for shown in (
        "vq_model/model.safetensors",
        "nothing was sent (dry run)",
        "license: mit",
        "name: FID without guidance",
    ):
        assert shown in dry.stdout
    (tmp_path / "figures.json").write_text('[{"value": 1}]')
    for arguments, message in (
        ((folder / "nothing", "me/thing"), "give a saved model's folder"),
        ((folder, "me/thing", "--metrics", tmp_path / "figures.json"), "fields of a model-index"),
        ((folder, "me/thing", "--tokenizer", "a/b"), "go with --convert"),
    ):
        refused = run("push", *arguments, "--dry-run")
        assert refused.exit_code == 1
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
