import errno
import json
import os
import tempfile

import pytest
import torch
from safetensors import safe_open

from tests.conversion.originals import (
    AR,
    AR_CONFIG,
    DINOV2,
    DIT,
    LATENT_STATISTICS,
    LIGHT_CONFIG,
    RAR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VFMAE,
    VFMAE_DINOV2,
    assert_equal,
    tiny,
)
from vfmtok_hf import (
    VFMAEModel,
    VFMTokARForImageGeneration,
    VFMTokDiTForImageGeneration,
    VFMTokImageProcessor,
    VFMTokModel,
    VFMTokRARForImageGeneration,
)
from vfmtok_hf.conversion import (
    CheckpointError,
    convert,
    convert_ar,
    convert_dit,
    convert_rar,
    convert_tokenizer,
    convert_vfmae,
    export_original_ar,
    export_original_dinov2,
    export_original_dit,
    export_original_rar,
    export_original_tokenizer,
    export_original_vfmae,
)
from vfmtok_hf.data.fingerprints import file_sha256


def load(model_class, folder):
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tokenizer"
    convert_tokenizer(TOKENIZER, folder, vision_checkpoint=DINOV2, config=TOKENIZER_CONFIG)
    return folder


@pytest.fixture(scope="module")
def vision_folder(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    VFMTokModel.from_pretrained(tokenizer_folder).vision_model.save_pretrained(folder)
    return folder


# -- folders hold the original's weights


GENERATOR_FILES = ["config.json", "generation_config.json", "model.safetensors", "provenance.json"]


def data_files(folder):
    """All but the code that goes along with every saved model."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".py"))


def test_tokenizer_folder(tokenizer_folder):
    weights_and_configs = ["config.json", "model.safetensors", "preprocessor_config.json", "provenance.json"]
    assert data_files(tokenizer_folder) == weights_and_configs
    model = load(VFMTokModel, tokenizer_folder)
    assert_equal(export_original_tokenizer(model), tiny(TOKENIZER))
    assert_equal(export_original_dinov2(model), tiny(DINOV2))
    assert VFMTokImageProcessor.from_pretrained(tokenizer_folder).size["height"] == model.config.image_size
    assert model.encode(torch.zeros(1, 3, 336, 336)).image_tokens.shape == (1, 16)


def test_folder_says_where_its_weights_come_from(tokenizer_folder):
    facts = json.loads((tokenizer_folder / "provenance.json").read_text())
    assert facts["source file"] == TOKENIZER.name
    assert facts["source sha256"] == file_sha256(TOKENIZER)
    assert facts["source entry"] == "ema"
    assert facts["converted with"].startswith("vfmtok-hf ")


def test_ar_folder(tmp_path):
    report = convert_ar(AR, tmp_path / "ar", config=AR_CONFIG)
    assert data_files(tmp_path / "ar") == GENERATOR_FILES
    assert_equal(export_original_ar(load(VFMTokARForImageGeneration, report.output)), tiny(AR))


def test_rar_folder(tmp_path):
    report = convert_rar(RAR, tmp_path / "rar")
    assert data_files(tmp_path / "rar") == GENERATOR_FILES
    assert_equal(export_original_rar(load(VFMTokRARForImageGeneration, report.output)), tiny(RAR))


def test_vfmae_folder(tmp_path):
    report = convert_vfmae(
        VFMAE,
        tmp_path / "vfmae",
        vision_checkpoint=VFMAE_DINOV2,
        latent_statistics=LATENT_STATISTICS,
        config=TOKENIZER_CONFIG,
    )
    weights_and_configs = ["config.json", "model.safetensors", "preprocessor_config.json", "provenance.json"]
    assert data_files(tmp_path / "vfmae") == weights_and_configs
    model = load(VFMAEModel, report.output)
    assert_equal(export_original_vfmae(model), tiny(VFMAE))
    assert_equal(export_original_dinov2(model), tiny(VFMAE_DINOV2))
    assert model.latents_mean.any()
    assert VFMTokImageProcessor.from_pretrained(tmp_path / "vfmae").size["height"] == 256


def test_dit_folder(tmp_path):
    report = convert_dit(DIT, tmp_path / "dit")
    assert data_files(tmp_path / "dit") == ["config.json", "model.safetensors", "provenance.json"]
    assert sorted(report.dropped) == sorted(key for key in tiny(DIT) if "rope" in key)
    exported, original = export_original_dit(load(VFMTokDiTForImageGeneration, report.output)), tiny(DIT)
    for key in report.dropped:
        torch.testing.assert_close(exported.pop(key), original.pop(key), atol=1e-6, rtol=0)
    assert_equal(exported, original)


def test_the_chosen_weights_are_converted(tmp_path):
    convert_ar(AR, tmp_path / "ar", weights="model", config=AR_CONFIG)
    exported = export_original_ar(load(VFMTokARForImageGeneration, tmp_path / "ar"))
    assert_equal(exported, tiny(AR, "model"))
    assert not torch.equal(exported["norm.weight"], tiny(AR, "ema")["norm.weight"])


def test_report(tmp_path):
    report = convert_tokenizer(TOKENIZER, tmp_path / "out", vision_checkpoint=DINOV2, config=TOKENIZER_CONFIG)
    assert (report.source, report.sha256, report.entry) == (TOKENIZER, file_sha256(TOKENIZER), "ema")
    assert report.keys_read == len(tiny(TOKENIZER)) + len(tiny(DINOV2))
    assert list(report.dropped) == ["slot_quantize.codebook_used"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        written = sum(file.get_tensor(key).numel() for key in file.keys())
    assert (report.num_parameters, report.dtypes) == (written, ("float32",))
    assert "dropped  slot_quantize.codebook_used" in report.summary()
    assert str(tmp_path / "out") in report.summary()


# -- vision weights


def test_light_checkpoint_decodes_and_encodes_once_it_has_its_vision_model(tmp_path, tokenizer_folder, vision_folder):
    report = convert_tokenizer(TOKENIZER, tmp_path / "light", config=LIGHT_CONFIG)
    assert not report.config.save_vision_model
    light, full = load(VFMTokModel, tmp_path / "light"), load(VFMTokModel, tokenizer_folder)
    images = torch.rand(1, 3, 336, 336) * 2 - 1
    with torch.no_grad():
        tokens = full.encode(images).image_tokens
        assert torch.equal(light.decode(tokens).reconstruction, full.decode(tokens).reconstruction)
        with pytest.raises(ValueError, match="no vision weights"):
            light.encode(images)
        light.load_vision_model(vision_folder)
        assert torch.equal(light.encode(images).image_tokens, tokens)


def test_vision_model_may_come_from_a_transformers_folder(tmp_path, tokenizer_folder, vision_folder):
    config = {"decoder_num_heads": 4}
    report = convert_tokenizer(TOKENIZER, tmp_path / "out", vision_model=vision_folder, config=config)
    assert report.config.save_vision_model
    expected = load(VFMTokModel, tokenizer_folder).state_dict()
    assert_equal(load(VFMTokModel, tmp_path / "out").state_dict(), expected)


def test_light_checkpoint_may_name_its_vision_model(tmp_path, vision_folder):
    config = {"decoder_num_heads": 4, "save_vision_model": False}
    convert_tokenizer(TOKENIZER, tmp_path / "light", vision_model=vision_folder, config=config)
    model = load(VFMTokModel, tmp_path / "light")
    assert model.vision_model is None
    model.load_vision_model()
    assert model.vision_model is not None


def test_only_one_source_of_vision_weights(tmp_path, vision_folder):
    with pytest.raises(ValueError, match="not both"):
        convert_tokenizer(TOKENIZER, tmp_path / "out", vision_checkpoint=DINOV2, vision_model=vision_folder)


def test_unknown_vision_models_leave_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder or repository of a vision model") as error:
        convert_tokenizer(TOKENIZER, tmp_path / "out", vision_model=tmp_path / "absent")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# -- configuration files


def test_config_may_be_a_json_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(AR_CONFIG))
    report = convert_ar(AR, tmp_path / "out", config=tmp_path / "config.json", dry_run=True)
    assert report.config.num_image_tokens == 16


@pytest.mark.parametrize(("content", "cause"), [("{", "is not JSON"), ("[1]", "must contain a JSON object")])
def test_bad_config_files(tmp_path, content, cause):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=cause):
        convert_ar(AR, tmp_path / "out", config=tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="no config file"):
        convert_ar(AR, tmp_path / "out", config=tmp_path / "absent.json")


# -- the output is whole or absent


def test_dry_run_writes_nothing(tmp_path):
    report = convert_tokenizer(TOKENIZER, tmp_path / "a" / "b", DINOV2, config=TOKENIZER_CONFIG, dry_run=True)
    assert report.output is None
    assert report.summary().endswith("written  nothing (dry run)")
    assert not list(tmp_path.iterdir())


def test_parents_are_made(tmp_path):
    convert_rar(RAR, tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a") == ["b"]


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, folder, **_):
        (folder / "half.bin").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(VFMTokRARForImageGeneration, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_rar(RAR, tmp_path / "rar")
    assert not list(tmp_path.iterdir())


def test_failed_overwriting_keeps_the_old_folder(tmp_path, monkeypatch):
    convert_rar(RAR, tmp_path / "rar")
    before = {path.name: path.read_bytes() for path in (tmp_path / "rar").iterdir()}
    monkeypatch.setattr(VFMTokRARForImageGeneration, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_rar(RAR, tmp_path / "rar", overwrite=True)
    assert os.listdir(tmp_path) == ["rar"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "rar").iterdir()} == before


def test_bad_checkpoints_leave_nothing(tmp_path):
    with pytest.raises(CheckpointError):
        convert_ar(RAR, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_existing_folders_are_replaced_on_request_only(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    convert_rar(RAR, folder)
    (folder / "stale.txt").write_text("")
    with pytest.raises(FileExistsError, match="not empty: choose another output, or overwrite it"):
        convert_rar(RAR, folder)
    convert_rar(RAR, folder, overwrite=True)
    assert not (folder / "stale.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_folders_that_hold_no_model_are_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a model folder"):
        convert_rar(RAR, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_checkpoint_is_never_overwritten(tmp_path):
    convert_rar(RAR, tmp_path / "out")
    checkpoint = tmp_path / "out" / "original.safetensors"
    checkpoint.write_bytes(RAR.read_bytes())
    with pytest.raises(FileExistsError, match="contains the checkpoint itself"):
        convert_rar(checkpoint, tmp_path / "out", overwrite=True)
    assert checkpoint.exists()


def test_impossible_outputs_are_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "read_checkpoint", lambda *_: pytest.fail("the checkpoint was read"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        convert_rar(RAR, tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        convert_rar(RAR, tmp_path / "file" / "out")

    def refuse(**_):  # a superuser may write anywhere, so that real permissions would not do
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"is not writable \(Read-only file system\)"):
        convert_rar(RAR, tmp_path / "out")
