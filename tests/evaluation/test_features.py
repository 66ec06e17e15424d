"""Feature networks: Inception's port on random weights, and vision models."""

import os
import pickle
from urllib.error import URLError

import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from tests.evaluation.folders import write_images
from tests.testing import tiny_model
from vfmtok_hf.evaluation.features import (
    Features,
    InceptionFeatures,
    OwnVisionFeatures,
    VisionModelFeatures,
    extract_features,
    first_channels,
    load_feature_extractor,
)
from vfmtok_hf.evaluation.images import FolderImages


TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 8,
}


def eight_bit(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights in the file format of torch-fidelity's Inception."""
    network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_: None)
        torch.save(network("random", ["2048"]).state_dict(), path)
    return path


def test_inception_gives_the_tensors_of_adms_evaluator(inception_weights):
    extractor = InceptionFeatures(inception_weights)
    images = eight_bit(2, 40)
    features = extractor(images)
    assert features.pooled.shape == (2, 2048)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    assert features.logits.shape == (2, 1008)
    torch.testing.assert_close(features.logits, features.pooled @ extractor.model.fc.weight.T)
    # ADM reads mixed_6/conv, the 1 x 1 branch of the block that torch calls Mixed_6d, channels last.
    block_input = []
    handle = extractor.model.Mixed_6d.register_forward_pre_hook(lambda module, inputs: block_input.append(inputs[0]))
    extractor(images)
    handle.remove()
    branch = extractor.model.Mixed_6d.branch1x1(block_input[0])
    torch.testing.assert_close(features.spatial.view(2, 17, 17, 7), branch[:, :7].permute(0, 2, 3, 1))


def test_inception_without_network_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"no route.*fetch https://.*--inception-weights.*--features"):
        InceptionFeatures()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


def test_files_that_are_not_inceptions_weights_are_refused_and_never_run(tmp_path):
    contents = {"text": b"hello\n", "empty": b"", "pickle": pickle.dumps(Trap(tmp_path / "sprung"), protocol=2)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other")
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "trap")
    for name in (*contents, "other", "trap"):
        with pytest.raises(ValueError, match=f"{name} does not hold Inception's weights: fetch https://"):
            InceptionFeatures(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(OSError, match="missing"):
        InceptionFeatures(tmp_path / "missing")


def test_first_channels_keep_2048_numbers_at_most():
    assert first_channels(torch.zeros(1, 192, 17, 17)).shape == (1, 2023)
    assert first_channels(torch.zeros(1, 64, 4, 4)).shape == (1, 64 * 16)
    assert first_channels(torch.zeros(1, 8, 64, 64)).shape == (1, 64 * 64)
    feature_map = torch.arange(8.0).view(1, 2, 2, 2)
    assert first_channels(feature_map).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_a_vision_model_gives_its_class_token_and_its_map(tmp_path):
    model = Dinov2Model(Dinov2Config(**TINY_VIT, image_size=32)).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    extractor = VisionModelFeatures(str(tmp_path))
    images = eight_bit(3, 32)
    features = extractor(images)
    with torch.no_grad():
        tokens = model((images / 255 - extractor.mean) / extractor.std).last_hidden_state
    torch.testing.assert_close(features.pooled, tokens[:, 0])
    torch.testing.assert_close(features.spatial, tokens[:, 1:].flatten(1))
    assert features.logits is None
    assert VisionModelFeatures(str(tmp_path), size=48)(images).spatial.shape == (3, 6 * 6 * 16)


def test_a_classifier_gives_logits(tmp_path):
    ViTForImageClassification(ViTConfig(**TINY_VIT, image_size=32, num_labels=5)).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    features = VisionModelFeatures(str(tmp_path))(eight_bit(2, 20))
    assert features.logits.shape == (2, 5)
    assert features.pooled.shape == (2, 16)


def test_a_tokenizers_own_vision_model():
    model = tiny_model()
    images = eight_bit(2, 32)
    features = OwnVisionFeatures(model)(images)
    level = model.extract_vision_features(images.float() / 127.5 - 1)[-1]
    torch.testing.assert_close(features.pooled, level.mean(dim=(2, 3)))
    with pytest.raises(ValueError, match="need an image tokenizer"):
        load_feature_extractor("own")


@pytest.mark.parametrize("broken", ["pooled", "spatial", "logits"])
def test_features_that_are_not_finite_are_refused(tmp_path, broken):
    write_images(tmp_path, 3)

    def extractor(images):
        columns = {name: torch.zeros(len(images), 2) for name in ("pooled", "spatial", "logits")}
        columns[broken][-1, 0] = torch.nan
        return Features(**columns)

    with pytest.raises(ValueError, match=r"Images 0 to 1 of .* NaN"):
        extract_features(FolderImages([tmp_path]), extractor, batch_size=2)
