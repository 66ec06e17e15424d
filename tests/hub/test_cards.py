"""Model cards."""

import re
import shutil

from huggingface_hub import ModelCard
from PIL import Image

from tests.pipelines.tiny_pipeline import tiny_dit_pipeline, tiny_pipeline
from vfmtok_hf import DEFAULT_CHECKPOINT
from vfmtok_hf.evaluation.results import measured_results, published_results, save_measurement
from vfmtok_hf.hub import model_card, push


FIGURE = {
    "metric_type": "fid",
    "metric_name": "FID without guidance",
    "metric_value": 2.04,
    "dataset_type": "imagenet-1k",
    "dataset_name": "ImageNet 256 x 256",
    "source_name": "measured",
    "source_url": "https://example.com",
}


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


def test_cards_cite_the_paper_of_their_architecture(folder, tmp_path):
    pipe = tiny_dit_pipeline()
    for name in ("vae", "transformer"):
        getattr(pipe, name).save_pretrained(tmp_path / name)
    pipe.image_processor.save_pretrained(tmp_path / "vae")
    pipe.save_pretrained(tmp_path / "pipe")
    for path in (tmp_path / "vae", tmp_path / "transformer", tmp_path / "pipe"):
        card = model_card(path, "me/thing")
        assert "arxiv:2605.18390" in card.data.tags
        assert "is [VFMTok2](https://arxiv.org/abs/2605.18390)." in card.text
        assert "  title   = {Vision Foundation Models as Generalist Tokenizers for Image Generation},\n" in card.text
        assert "  year    = {2026}\n}\n```" in card.text
        assert "2507.08441" not in str(card)
    card = model_card(folder, "me/thing")
    assert "arxiv:2507.08441" in card.data.tags
    assert "  journal = {arXiv preprint arXiv:2507.08441},\n  year    = {2025}\n}" in card.text


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
    assert f"| parameters | {total:,} |" in model_card(folder, "me/thing").text


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
    assert "# Emoji: the checkpoint that ships with vfmtok-hf" in report.card
