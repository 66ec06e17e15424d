"""Feature networks: Inception's port on random weights, and vision models."""

import os
import pickle
from urllib.error import URLError

import pytest
import torch
import transformers
from torch_fidelity import feature_extractor_inceptionv3
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from tests.evaluation.folders import write_images
from tests.testing import tiny_model
from vfmtok_hf.data.image_sets import FolderImages
from vfmtok_hf.evaluation.features import (
    Features,
    InceptionFeatures,
    OwnVisionFeatures,
    VisionModelFeatures,
    extract_features,
    first_channels,
    load_feature_extractor,
)


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
    with pytest.raises(OSError, match=r"no route.*Download https://.*--inception-weights.*--features"):
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
        with pytest.raises(ValueError, match=f"{name} does not contain Inception's weights: download https://"):
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
        tokens = model(
            **BitImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt", do_resize=False)
        ).last_hidden_state
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


TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**TOWER, "vocab_size": 10, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
TOWERS = {"text_config": TEXT, "vision_config": {**TOWER, "image_size": 32, "patch_size": 8}}
SQUARE = {"height": 32, "width": 32}
SHORT = {"size": {"shortest_edge": 64}}
CROP = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
WINDOWS = {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

# Model -> image processor, side of the network's input, channels, whether the class token comes first.
VISION_MODELS = {
    "convolutions, a shortest edge": (
        lambda: transformers.ConvNextModel(transformers.ConvNextConfig(**STAGES, num_stages=2)),
        transformers.ConvNextImageProcessor(**SHORT), 64, 16, False,
    ),
    "a classifier, a shortest edge": (
        lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(embedding_size=8, **STAGES)),
        transformers.ConvNextImageProcessor(**SHORT), 64, 16, False,
    ),
    "a hierarchy": (
        lambda: transformers.SwinModel(transformers.SwinConfig(**WINDOWS)),
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}), 64, 16, False,
    ),
    "CLIP": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig(**TOWERS)),
        transformers.CLIPImageProcessor(**CROP), 32, 16, True,
    ),
    "SigLIP": (
        lambda: transformers.SiglipModel(transformers.SiglipConfig(**TOWERS)),
        transformers.SiglipImageProcessor(size=SQUARE), 32, 16, False,
    ),
    "a classifier of two towers": (
        lambda: transformers.SiglipForImageClassification(transformers.SiglipConfig(**TOWERS)),
        transformers.SiglipImageProcessor(size=SQUARE), 32, 16, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_vision_models_of_any_family(tmp_path, kind):
    make, processor, size, channels, has_class_token = VISION_MODELS[kind]
    make().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    extractor = VisionModelFeatures(str(tmp_path))
    features = extractor(eight_bit(2, 48))
    assert extractor.size == size
    assert features.pooled.shape == (2, channels)
    assert (features.logits is not None) == ("classifier" in kind)
    positions_mean = features.spatial.view(2, -1, channels).mean(1)
    assert torch.allclose(features.pooled, positions_mean, atol=1e-5) == (not has_class_token)


def test_a_towers_features_are_those_of_the_tower_alone(tmp_path):
    transformers.CLIPModel(transformers.CLIPConfig(**TOWERS)).save_pretrained(tmp_path / "both")
    transformers.CLIPVisionModel.from_pretrained(tmp_path / "both").save_pretrained(tmp_path / "one")
    for folder in ("both", "one"):
        transformers.CLIPImageProcessor(**CROP).save_pretrained(tmp_path / folder)
    images = eight_bit(2, 32)
    both, one = (VisionModelFeatures(str(tmp_path / name))(images) for name in ("both", "one"))
    torch.testing.assert_close(both.pooled, one.pooled)
    torch.testing.assert_close(both.spatial, one.spatial)


def test_timm_models_whose_maps_have_channels_last(tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture="swin_tiny_patch4_window7_224",
        pretrained_cfg={"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3},
        model_args={"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)},
    )
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path)
    features = VisionModelFeatures(str(tmp_path))(eight_bit(1, 32))
    assert features.pooled.shape == (1, 16)
    assert features.spatial.shape == (1, 28 * 28 * 2)


PATCHES = {**TOWER, "patch_size": 8}
NOT_FEATURES = {
    "no processor": (lambda: transformers.ViTModel(transformers.ViTConfig(**PATCHES, image_size=32)), None, "no image processor"),
    "text": (
        lambda: transformers.BertModel(transformers.BertConfig(**TEXT)), transformers.ViTImageProcessor(size=SQUARE),
        r"\(bert\) returns no features for 32 x 32 images",
    ),
    "random masks": (
        lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**PATCHES, image_size=32)),
        transformers.ViTImageProcessor(size=SQUARE), "different features each time",
    ),
    "any size": (
        lambda: transformers.Siglip2Model(
            transformers.Siglip2Config(text_config=TEXT, vision_config={**PATCHES, "num_patches": 16})
        ),
        transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), "images of any size: choose one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_FEATURES)
def test_models_without_features_are_refused_in_words(tmp_path, kind):
    make, processor, message = NOT_FEATURES[kind]
    make().save_pretrained(tmp_path)
    if processor is not None:
        processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        VisionModelFeatures(str(tmp_path))


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
