"""Wrong calls of the pipeline and its components: each is answered in words, before any work."""

import re

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset

from tests.pipelines.tiny_pipeline import tiny_generator, tiny_pipeline
from vfmtok_hf.modeling.configuration_vfmtok import VFMTokConfig
from vfmtok_hf.modeling.configuration_vfmtok_ar import VFMTokARConfig
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.pipelines import VFMTokPipeline


@pytest.fixture(params=["ar", "rar"])
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture
def ar_pipe():
    return tiny_pipeline("ar")


@pytest.mark.parametrize("label", [torch.tensor(1), np.array(1), np.int64(1)])
def test_a_number_of_any_library_is_a_label(ar_pipe, label):
    assert ar_pipe.get_label_ids(label) == [1]


@pytest.mark.parametrize("labels", [None, 1.0, [None], [["crane"]], torch.tensor([[0, 1]])])
def test_what_is_no_label_is_refused_in_words(ar_pipe, labels):
    with pytest.raises(TypeError, match="Class labels are names or integers"):
        ar_pipe(labels)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": "a bear"}, "pass class_labels instead"),
        ({"num_inference_steps": 20}, "num_inference_steps. Settings of sampling are guidance_scale"),
        ({"decode_batch_size": 1.5}, "decode_batch_size must be an integer, got 1.5"),
        ({"num_images_per_label": 1.5}, "num_images_per_label must be an integer, got 1.5"),
        ({"num_images_per_label": "2"}, "num_images_per_label must be an integer, got '2'"),
        ({"generator": 0}, "must be a torch.Generator"),
        ({"generator": [np.random.default_rng(0)]}, "must be a torch.Generator"),
        ({"temperature": "1"}, "temperature must be a number"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_k": True}, "top_k must be an integer, got True"),
        ({"guidance_scale": [1, 2]}, "guidance_scale must be a number"),
        ({"guidance_scale": 2, "guidance_interval": 2.5}, "guidance_interval must be an integer"),
        ({"generation_config": {"top_k": 5}}, "must be a GenerationConfig"),
        ({"callback_on_step_end": lambda pipe, step, time, tensors: tensors["image_tokens"]}, "returns a dictionary"),
        ({"callback_on_step_end": lambda *_: {"image_tokens": np.zeros((1, 9))}}, "must be a tensor, got ndarray"),
    ],
)
def test_wrong_arguments_are_refused_in_words(pipe, kwargs, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        pipe(0, output_type="tokens", **kwargs)


def test_a_list_of_logits_processors_will_do(pipe):
    def forbid(tokens, logits):
        return logits.masked_fill(torch.arange(logits.shape[-1]) != 5, -torch.inf)

    assert pipe(0, output_type="tokens", logits_processor=[forbid]).images.unique().tolist() == [5]


def test_tokens_of_a_generator_and_of_a_column(ar_pipe):
    tokens = ar_pipe([0, 1], output_type="tokens").images
    expected = ar_pipe.detokenize(tokens, "np")
    column = Dataset.from_dict({"image_tokens": tokens.tolist()})["image_tokens"]
    for held in ((row for row in tokens), column):
        np.testing.assert_array_equal(ar_pipe.detokenize(held, "np"), expected)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_have_images(ar_pipe, batch_size):
    tokens = ar_pipe(0, output_type="tokens").images
    for call in (
        lambda: ar_pipe.tokenize(PIL.Image.new("RGB", (40, 32)), batch_size),
        lambda: ar_pipe.detokenize(tokens, batch_size=batch_size),
    ):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            call()


@pytest.mark.parametrize("size", [0, -8, 64.0, "64", (64, 64)])
def test_a_size_is_a_number_of_pixels(ar_pipe, size):
    with pytest.raises(ValueError, match="side of the image in pixels"):
        ar_pipe.detokenize(ar_pipe(0, output_type="tokens").images, size=size)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_a_precision_may_be_given_by_name(ar_pipe, tmp_path, dtype, expected):
    ar_pipe.save_pretrained(tmp_path)
    loaded = VFMTokPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.transformer.dtype == loaded.vq_model.post_quant_proj.weight.dtype == expected


def test_names_that_a_generator_has_are_not_replaced_without_a_word(ar_pipe, tmp_path, caplog):
    ar_pipe.save_pretrained(tmp_path)
    names = ar_pipe.id2label
    assert VFMTokPipeline.from_pretrained(tmp_path, id2label={0: "sun"}).id2label == names
    assert "id2label is not used" in caplog.text
    caplog.clear()
    other = tiny_generator()
    other.resize_class_embeddings(["sun", "moon"])
    assert VFMTokPipeline.from_pretrained(tmp_path, transformer=other).id2label == {0: "sun", 1: "moon"}
    assert not caplog.text


@pytest.mark.parametrize(
    ("component", "subfolder"),
    [
        (VFMTokConfig, "vq_model"),
        (VFMTokModel, "vq_model"),
        (VFMTokARConfig, "transformer"),
        (VFMTokImageProcessor, "image_processor"),
    ],
)
def test_components_are_not_looked_for_in_the_root_of_a_pipeline(component, subfolder, ar_pipe, tmp_path):
    ar_pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"load its {component.__name__} with subfolder='{subfolder}'"):
        component.from_pretrained(tmp_path)
    component.from_pretrained(tmp_path, subfolder=subfolder)


@pytest.mark.parametrize("component", [VFMTokConfig, VFMTokModel, VFMTokImageProcessor, VFMTokPipeline])
def test_a_folder_that_is_not_there_is_no_repository(component):
    with pytest.raises(FileNotFoundError, match="There is no folder ./runs/mine/model"):
        component.from_pretrained("./runs/mine/model")
