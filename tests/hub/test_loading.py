"""Damaged folders, foreign models and a Hub that refuses: each is an error of one line that says what is wrong."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from vfmtok_hf import VFMTokImageProcessor, VFMTokModel, VFMTokPipeline, VFMTokRARForImageGeneration


def change_config(folder, file="config.json", **fields):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **fields}))


def truncate(file):
    file.write_bytes(file.read_bytes()[:5000])


def change_weights(file, drop=(), **add):
    weights = load_file(file)
    for name in drop:
        del weights[name]
    weights.update({name: weights[source].clone() for name, source in add.items()})
    save_file(weights, file, metadata={"format": "pt"})


# What happens to the folder of a tokenizer, and what loading it then says.
MODEL_DAMAGES = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), OSError, "no file named model.safetensors"),
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), ValueError, "damaged or truncated"),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ValueError,
        "damaged or truncated",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ValueError, "no config.json"),
    "damaged config": (lambda folder: (folder / "config.json").write_text("{"), OSError, "not a valid JSON"),
    "foreign model": (
        lambda folder: change_config(folder, model_type="bert"),
        ValueError,
        "of type 'bert', not 'vfmtok'",
    ),
    "missing tensors": (
        lambda folder: change_weights(folder / "model.safetensors", drop=["quant_proj.weight", "quant_proj.bias"]),
        ValueError,
        "lacks weights: 'quant_proj.bias' .of 2",
    ),
    "extra tensors": (
        lambda folder: change_weights(folder / "model.safetensors", extra="quant_proj.bias"),
        ValueError,
        "has unknown weights: 'extra'",
    ),
    "other shapes": (
        lambda folder: change_config(folder, codebook_size=32),
        ValueError,
        r"'quantizer.* has shape \(64, 4\) instead of \(32, 4\)",
    ),
}


@pytest.mark.parametrize("damage", MODEL_DAMAGES)
def test_damaged_models_are_refused(published, tmp_path, damage):
    harm, error, message = MODEL_DAMAGES[damage]
    folder = shutil.copytree(published / "tokenizer", tmp_path / "tokenizer")
    harm(folder)
    with pytest.raises(error, match=message) as raised:
        VFMTokModel.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_a_missing_shard_is_refused(published, tmp_path):
    folder = shutil.copytree(published / "pipe" / "vq_model", tmp_path / "vq_model")
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(OSError, match="model-00002"):
        VFMTokModel.from_pretrained(folder)


def test_extra_files_do_no_harm(published, tmp_path):
    folder = shutil.copytree(published / "tokenizer", tmp_path / "tokenizer")
    (folder / "notes.txt").write_text("mine")
    (folder / "pytorch_model.bin").write_bytes(b"not read where there are safetensors")
    VFMTokModel.from_pretrained(folder)


def test_who_wants_to_look_at_what_is_missing_may(published, tmp_path):
    folder = shutil.copytree(published / "tokenizer", tmp_path / "tokenizer")
    change_weights(folder / "model.safetensors", drop=["quant_proj.weight"])
    _, info = VFMTokModel.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"quant_proj.weight"}


def test_a_generator_for_other_classes_starts_from_the_weights_that_fit(published):
    with pytest.raises(ValueError, match="embed_tokens"):
        VFMTokRARForImageGeneration.from_pretrained(published / "rar", num_classes=3, id2label=None)
    model = VFMTokRARForImageGeneration.from_pretrained(
        published / "rar", num_classes=3, id2label=None, ignore_mismatched_sizes=True
    )
    assert model.config.num_classes == 3


PIPELINE_DAMAGES = {
    "no component": (lambda folder: shutil.rmtree(folder / "vq_model"), ValueError, "no config.json"),
    "truncated weights": (
        lambda folder: truncate(next((folder / "transformer").glob("*00001*"))),
        ValueError,
        "damaged or truncated",
    ),
    "damaged index": (lambda folder: (folder / "model_index.json").write_text("["), OSError, "not a valid JSON"),
    "foreign pipeline": (
        lambda folder: change_config(folder, "model_index.json", _class_name="DiTPipeline"),
        ValueError,
        "This is a DiTPipeline, not a VFMTokPipeline: load it with from_pretrained of its own class",
    ),
    "foreign generator": (
        lambda folder: change_config(folder / "transformer", model_type="gpt2"),
        ValueError,
        "of type 'gpt2'",
    ),
    "no processor": (
        lambda folder: (folder / "image_processor" / "preprocessor_config.json").unlink(),
        OSError,
        "preprocessor_config.json",
    ),
}


@pytest.mark.parametrize("damage", PIPELINE_DAMAGES)
def test_damaged_pipelines_are_refused(published, tmp_path, damage):
    harm, error, message = PIPELINE_DAMAGES[damage]
    folder = shutil.copytree(published / "pipe", tmp_path / "pipe")
    harm(folder)
    with pytest.raises(error, match=message) as raised:
        VFMTokPipeline.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_a_missing_variant_is_refused(published, tmp_path):
    folder = shutil.copytree(published / "pipe", tmp_path / "pipe")
    (folder / "vq_model" / "model.fp16.safetensors").unlink()
    for shard in (folder / "vq_model").glob("model-*"):
        shard.unlink()
    with pytest.raises(OSError, match="model.safetensors|model-"):
        VFMTokPipeline.from_pretrained(folder, variant="fp16")


def test_code_of_a_component_runs_only_with_trust_remote_code(published, hub, client, tmp_path):
    folder = shutil.copytree(published / "pipe", tmp_path / "coded")
    change_config(folder, "model_index.json", image_processor=["coded", "Coded"])
    (folder / "image_processor" / "coded.py").write_text("raise RuntimeError('it runs')")
    hub.put("coded", folder)
    client(
        f"""
        from vfmtok_hf import VFMTokPipeline

        for path in ("tester/coded", {str(folder)!r}):
            for trust, expected, message in ((False, ValueError, "trust_remote_code=True"), (True, RuntimeError, "it runs")):
                try:
                    VFMTokPipeline.from_pretrained(path, trust_remote_code=trust)
                except expected as error:
                    assert message in str(error), str(error)
                else:
                    raise AssertionError((path, trust))
        """
    )


def test_a_missing_processor_is_refused(tmp_path):
    with pytest.raises(OSError, match="preprocessor_config.json") as raised:
        VFMTokImageProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


# Repository -> the Hub's answers to requests for it, and what the error says.
REFUSALS = {
    "nothing": ({}, "not a valid model identifier|Repository Not Found"),
    "locked": ({"tester/locked": 401}, "401"),
    "broken": ({"tester/broken": 500}, "connect|500|load image processor"),
    "cut": ({"GET /tester/cut[^/]*/resolve/.*json": "cut"}, "closed connection"),
    "without-weights": ({"tester/without-weights[^/]*/resolve/.*safetensors": 404}, "safetensors|404"),
}


def test_what_the_hub_refuses_is_an_error_of_one_line(published, hub, client, faults):
    for name, (answers, _) in REFUSALS.items():
        faults.update(answers)
        if name != "nothing":
            hub.repositories[f"tester/{name}"] = hub.repositories["tester/pipe"]
            hub.repositories[f"tester/{name}-model"] = hub.repositories["tester/tokenizer"]
    client(
        f"""
        import re
        from vfmtok_hf import VFMTokImageProcessor, VFMTokModel, VFMTokPipeline

        def check(cls, name, message, **options):
            try:
                cls.from_pretrained(name, **options)
            except OSError as error:
                assert re.search(message, str(error)), (name, str(error))
                assert "\\n" not in str(error), str(error)
            else:
                raise AssertionError((cls, name))

        for name, message in {[(name, message) for name, (_, message) in REFUSALS.items()]!r}:
            check(VFMTokPipeline, "tester/" + name, message)
            check(VFMTokModel, "tester/" + name + "-model", message)
            if name != "without-weights":
                check(VFMTokImageProcessor, "tester/" + name + "-model", message)
        for cls in (VFMTokImageProcessor, VFMTokModel):
            check(cls, "tester/tokenizer", "nope", revision="nope")
        check(VFMTokPipeline, "tester/pipe", "nope", revision="nope")
        """
    )


def test_a_light_checkpoint_fetches_its_vision_model_by_name_and_revision(published, hub, client, faults):
    revision = hub.repositories["tester/vision"].head.oid
    hub.requests.clear()
    client(
        f"""
        from safetensors.torch import load_file
        from vfmtok_hf import VFMTokModel

        expected = load_file({str(published / "expected")!r})
        model = VFMTokModel.from_pretrained("tester/light")
        model.decode(image_tokens=expected["tokens"])
        try:
            model.encode(expected["images"])
        except ValueError as error:
            assert "load_vision_model('tester/vision')" in str(error)
        else:
            raise AssertionError
        """
    )
    assert not any("tester/vision" in request for request in hub.requests)
    client(
        f"""
        from safetensors.torch import load_file
        from transformers import AutoModel
        from vfmtok_hf import VFMTokModel

        expected = load_file({str(published / "expected")!r})
        for cls in (VFMTokModel, AutoModel):
            model = cls.from_pretrained("tester/light", load_vision_model=True)
            assert model.encode(expected["images"]).image_tokens.equal(expected["tokens"])

        model.save_pretrained("light_again")
        again = VFMTokModel.from_pretrained("light_again")
        assert again.vision_model is None
        assert again.config.vision_model_revision == {revision!r}

        whole = VFMTokModel.from_pretrained("tester/tokenizer")
        whole.load_vision_model("tester/vision")
        whole.config.save_vision_model = False
        whole.save_pretrained("made_light")
        made_light = VFMTokModel.from_pretrained("made_light")
        assert made_light.vision_model is None
        source = made_light.config.vision_model_name_or_path, made_light.config.vision_model_revision
        assert source == ("tester/vision", {revision!r})
        """
    )
    assert any(f"tester/vision/resolve/{revision}" in request for request in hub.requests)
    faults["tester/vision"] = 401
    client(
        """
        from vfmtok_hf import VFMTokModel
        model = VFMTokModel.from_pretrained("tester/light")
        try:
            model.load_vision_model(cache_dir="empty")
        except OSError as error:
            assert "Call load_vision_model(folder) with a copy of it." in str(error), str(error)
            assert "\\n" not in str(error)
        else:
            raise AssertionError
        """
    )
