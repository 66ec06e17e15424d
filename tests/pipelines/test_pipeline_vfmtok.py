"""The pipeline: labels, seeds, callbacks, output types, the tokenizer round trip and editing, with either generator."""

import base64
import io
import json
import re
from contextlib import nullcontext

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset

from tests.pipelines.tiny_pipeline import ID2LABEL, tiny_generator, tiny_pipeline
from tests.testing import tiny_model
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.pipelines import VFMTokPipeline
from vfmtok_hf.pipelines.pipeline_base_vfmtok import DTYPE


@pytest.fixture(params=["ar", "rar"])
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture
def ar_pipe():
    return tiny_pipeline("ar")


@pytest.fixture
def rar_pipe():
    return tiny_pipeline("rar")


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def photograph(seed=0, height=40, width=50):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# -- labels


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (1, [1]),
        ("heart", [1]),
        ("HEART", [1]),
        (" happy  FACE ", [0]),
        ("smiley, happy face", [0]),
        ("ailurus", [4]),
        ("red panda", [4]),
        ("3", [3]),
        (["smiley", 1, "4"], [0, 1, 4]),
        (range(2), [0, 1]),
        (np.array([2, 0]), [2, 0]),
        (torch.tensor([2, 0]), [2, 0]),
    ],
)
def test_labels_are_found_by_number_and_by_any_synonym(ar_pipe, labels, ids):
    assert ar_pipe.get_label_ids(labels) == ids


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("hart", "no class 'hart'.*Did you mean 'heart'"),
        ("xyzzy", "no class 'xyzzy'.*classes are smiley, heart"),
        ("crane", r"several classes: 2 \(crane\), 3 \(crane\)"),
        (5, "0 to 4, got 5"),
        ([0, -1], "0 to 4, got -1"),
        ("5", "0 to 4, got 5"),
        ([], "no class labels"),
    ],
)
def test_bad_labels_are_refused(ar_pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        ar_pipe(labels)


def test_fractions_are_no_labels(ar_pipe):
    with pytest.raises(TypeError, match="names or integers"):
        ar_pipe([1.5])


def test_a_pipeline_without_names_asks_for_numbers():
    pipe = VFMTokPipeline(tiny_model(), tiny_generator(id2label=None), VFMTokImageProcessor(size=32))
    assert pipe.id2label == {}
    assert pipe.get_label_ids([3]) == [3]
    with pytest.raises(ValueError, match="has no class names: pass class numbers"):
        pipe("heart")


# -- class names live in the generator's configuration


RENAMED = ["heart", "smiley", "zebra", "yak", "emu"]


def renamed_generator():
    generator = tiny_generator()
    generator.resize_class_embeddings(RENAMED)
    return generator


def passed(folder, pipe):
    return VFMTokPipeline.from_pretrained(folder, transformer=renamed_generator())


def from_pipe(folder, pipe):
    return VFMTokPipeline.from_pipe(pipe, transformer=renamed_generator())


def assigned(folder, pipe):
    pipe.transformer = renamed_generator()
    return pipe


def registered(folder, pipe):
    pipe.register_modules(transformer=renamed_generator())
    return pipe


def resized(folder, pipe):
    pipe.transformer.resize_class_embeddings(RENAMED)
    return pipe


def configured(folder, pipe):
    pipe.transformer.config.id2label = dict(enumerate(RENAMED))
    return pipe


def built_with_other_names(folder, pipe):
    return VFMTokPipeline(pipe.vq_model, renamed_generator(), pipe.image_processor, id2label=ID2LABEL)


@pytest.mark.parametrize(
    "change", [passed, from_pipe, assigned, registered, resized, configured, built_with_other_names]
)
def test_names_are_those_of_the_generator_at_hand(ar_pipe, change, tmp_path):
    ar_pipe.save_pretrained(tmp_path / "before")
    pipe = change(tmp_path / "before", ar_pipe)
    assert pipe.id2label == dict(enumerate(RENAMED))
    assert pipe.get_label_ids(["heart", "zebra"]) == [0, 2]
    with pytest.raises(ValueError, match="no class 'crane'"):
        pipe.get_label_ids("crane")
    pipe.save_pretrained(tmp_path / "after")
    assert VFMTokPipeline.from_pretrained(tmp_path / "after").get_label_ids("smiley") == [1]
    index = json.loads((tmp_path / "after" / "model_index.json").read_text())
    assert index["id2label"] == {str(class_id): name for class_id, name in enumerate(RENAMED)}


def test_names_given_to_a_nameless_generator_are_kept_in_its_configuration(tmp_path):
    names = {str(class_id): name for class_id, name in ID2LABEL.items()}
    pipe = VFMTokPipeline(tiny_model(), tiny_generator(id2label=None), VFMTokImageProcessor(size=32), id2label=names)
    assert pipe.transformer.config.id2label == pipe.id2label == ID2LABEL
    pipe.save_pretrained(tmp_path)
    assert type(pipe.transformer).from_pretrained(tmp_path / "transformer").config.id2label == ID2LABEL


def test_a_pipeline_without_generator_still_says_its_names(ar_pipe, tmp_path):
    ar_pipe.save_pretrained(tmp_path / "whole")
    VFMTokPipeline.from_pretrained(tmp_path / "whole", transformer=None).save_pretrained(tmp_path / "part")
    assert VFMTokPipeline.from_pretrained(tmp_path / "part", transformer=None).id2label == ID2LABEL


def test_an_assigned_generator_of_another_tokenizer_is_refused(ar_pipe):
    ar_pipe.transformer = tiny_generator(codebook_size=32)
    with pytest.raises(ValueError, match="another image tokenizer.*codebook_size is 32.*is 64"):
        ar_pipe(0)


# -- sampling


def test_output_types_agree(pipe):
    outputs = {
        output_type: pipe([0, "heart"], generator=seeds(0, 1), output_type=output_type).images
        for output_type in ("tokens", "pil", "np", "pt")
    }
    assert outputs["tokens"].shape == (2, 9)
    assert outputs["tokens"].dtype == torch.int64
    assert [picture.size for picture in outputs["pil"]] == [(32, 32)] * 2
    assert outputs["pt"].shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in outputs["pil"]]), np.rint(outputs["np"] * 255))
    np.testing.assert_allclose(outputs["np"].transpose(0, 3, 1, 2), outputs["pt"].numpy())
    decoded = pipe.vq_model.decode(image_tokens=outputs["tokens"]).reconstruction
    torch.testing.assert_close(pipe.image_processor.postprocess(decoded, "pt"), outputs["pt"])


def test_a_notebook_shows_the_images_of_an_output(pipe):
    shown = pipe([0, 1])._repr_html_()
    encoded = re.findall(r'<img src="data:image/png;base64,([^"]+)"', shown)
    images = [PIL.Image.open(io.BytesIO(base64.b64decode(png))) for png in encoded]
    assert [image.size for image in images] == [(32, 32)] * 2
    assert pipe([0, 1], output_type="tokens")._repr_html_() is None


def test_return_dict(pipe):
    (images,) = pipe(0, generator=seeds(0), output_type="tokens", return_dict=False)
    assert torch.equal(images, pipe(0, generator=seeds(0), output_type="tokens").images)


def test_a_seed_gives_the_same_image_in_any_batch(pipe):
    labels = [0, 1, 4, 1]
    together = pipe(labels, generator=seeds(*range(4)), output_type="tokens").images
    alone = [pipe(label, generator=seeds(i), output_type="tokens").images for i, label in enumerate(labels)]
    assert torch.equal(together, torch.cat(alone))
    # Convolutions round differently in batches of different sizes, which may turn a level at the edge of the next.
    pictures = pipe.detokenize(together, "np")
    difference = np.abs(pictures - pipe.detokenize(together, "np", batch_size=3))
    assert difference.max() <= 1.01 / 255
    assert (difference > 0).mean() < 1e-3


def test_images_of_a_label_follow_each_other(pipe):
    repeated = pipe([0, 1], num_images_per_label=2, generator=seeds(*range(4)), output_type="tokens").images
    listed = pipe([0, 0, 1, 1], generator=seeds(*range(4)), output_type="tokens").images
    assert torch.equal(repeated, listed)


def test_settings_reach_the_generator(pipe):
    greedy = pipe([0, 1], do_sample=False, output_type="tokens").images
    assert torch.equal(greedy, pipe.transformer.generate(torch.tensor([0, 1]), do_sample=False))
    assert torch.equal(greedy, pipe([0, 1], top_k=1, output_type="tokens").images)
    guided = pipe([0, 1], guidance_scale=4.0, guidance_interval=5, do_sample=False, output_type="tokens").images
    expected = pipe.transformer.generate(
        torch.tensor([0, 1]), guidance_scale=4.0, guidance_interval=5, do_sample=False
    )
    assert torch.equal(guided, expected)


def test_settings_left_out_come_from_the_generation_config(pipe):
    pipe.transformer.generation_config.top_k = 1
    assert torch.equal(pipe(0, output_type="tokens").images, pipe(0, do_sample=False, output_type="tokens").images)


def test_model_specific_settings_pass_through(ar_pipe, rar_pipe):
    orders = torch.arange(9).flip(0)
    tokens = rar_pipe(0, guidance_scale_pow=2.0, orders=orders, do_sample=False, output_type="tokens").images
    assert tokens.shape == (1, 9)
    with pytest.raises(TypeError, match="guidance_scale_pow"):
        ar_pipe(0, guidance_scale_pow=2.0)


def test_each_step_calls_back(pipe):
    steps = []

    def remember(called_pipe, step, timestep, tensors):
        assert called_pipe is pipe
        steps.append((step, timestep, int((tensors["image_tokens"] != 0).sum())))

    pipe([0, 1], callback_on_step_end=remember, generator=seeds(0, 1))
    assert [step for step, _, _ in steps] == list(range(9))
    assert steps[0][2] <= 2


def test_a_callback_can_stop(pipe):
    calls = []

    def stop_after_three(called_pipe, step, timestep, tensors):
        calls.append(step)
        called_pipe._interrupt = step == 2

    tokens = pipe(0, callback_on_step_end=stop_after_three, generator=seeds(0), output_type="tokens").images
    assert calls == [0, 1, 2]
    assert pipe.interrupt
    whole = pipe(0, generator=seeds(0), output_type="tokens").images
    assert not pipe.interrupt
    assert torch.equal(tokens[:, :3], whole[:, :3])
    assert not tokens[:, 3:].any()


def test_tokens_that_the_callback_returns_are_used(pipe):

    def change(called_pipe, step, timestep, tensors):
        tokens = tensors["image_tokens"].clone()
        if step == 3:
            tokens[:, 3] = (tokens[:, 3] + 1) % 64
        return {"image_tokens": tokens}

    plain = pipe([0, 1], do_sample=False, output_type="tokens").images
    changed = pipe([0, 1], do_sample=False, output_type="tokens", callback_on_step_end=change).images
    assert torch.equal(changed[:, :3], plain[:, :3])
    assert torch.equal(changed[:, 3], (plain[:, 3] + 1) % 64)


def test_returned_tokens_are_in_raster_order(rar_pipe):
    orders = torch.arange(9).flip(0)

    def change(called_pipe, step, timestep, tensors):
        if step == 0:
            assert (tensors["image_tokens"][:, :8] == 0).all()
            return {"image_tokens": torch.nn.functional.pad(torch.tensor([[63]]), (8, 0))}

    tokens = rar_pipe(0, orders=orders, output_type="tokens", callback_on_step_end=change).images
    assert tokens[0, 8] == 63


@pytest.mark.parametrize("returned", [torch.full((1, 9), 64), torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 9)])
def test_unusable_tokens_of_a_callback_are_refused(pipe, returned):
    with pytest.raises((ValueError, TypeError), match="image_tokens must"):
        pipe(0, callback_on_step_end=lambda *_: {"image_tokens": returned})


def test_tensor_inputs_of_the_callback(pipe):
    seen = []
    pipe(0, callback_on_step_end=lambda *arguments: seen.append(arguments[3]), callback_on_step_end_tensor_inputs=[])
    assert seen == [{}] * 9
    with pytest.raises(ValueError, match=r"may contain \['image_tokens'\], got \['latents'\]"):
        pipe(0, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["latents"])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"callback": print}, "callback_on_step_end"),
        ({"num_images_per_prompt": 2}, "num_images_per_label"),
        ({"seed": 0}, "generator=torch.Generator"),
    ],
)
def test_arguments_of_other_pipelines_are_named(pipe, wrong, right):
    with pytest.raises(TypeError, match=f"no argument '{next(iter(wrong))}': pass {right}"):
        pipe(0, **wrong)


def test_progress_bar_counts_tokens(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe([0, 1])
    assert "9/9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_type": "jpeg"}, "output_type"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
        ({"decode_batch_size": 0}, "decode_batch_size must be at least 1"),
        ({"generator": seeds(0, 1)}, "2 generators for 1 images"),
        ({"temperature": 0.0}, "temperature"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
    ],
)
def test_bad_arguments_are_refused(pipe, kwargs, message, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", None)  # nothing is sampled
    with pytest.raises(ValueError, match=message):
        pipe(0, **kwargs)


@pytest.mark.parametrize("component", ["vq_model", "transformer"])
def test_damaged_weights_are_reported(ar_pipe, component):
    next(getattr(ar_pipe, component).parameters()).data.fill_(torch.nan)
    damaged = {"vq_model": lambda: ar_pipe.tokenize(photograph()), "transformer": lambda: ar_pipe(0)}[component]
    with pytest.raises(ValueError, match=r"NaN|not finite"):
        damaged()


# -- images <-> image tokens


def test_reconstruct_is_tokenize_then_detokenize(ar_pipe, tmp_path):
    PIL.Image.fromarray(photograph(1)).save(tmp_path / "image.png")
    images = [photograph(0), tmp_path / "image.png", PIL.Image.fromarray(photograph(2, 33, 77))]
    tokens = ar_pipe.tokenize(images)
    pixel_values = ar_pipe.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(tokens, ar_pipe.vq_model.encode(pixel_values).image_tokens)
    assert torch.equal(tokens, ar_pipe.tokenize(images, batch_size=2))
    reconstructions = ar_pipe.reconstruct(images, output_type="np").images
    np.testing.assert_array_equal(reconstructions, ar_pipe.detokenize(tokens, output_type="np"))
    assert torch.equal(ar_pipe.reconstruct(images, output_type="tokens").images, tokens)
    assert len(ar_pipe.reconstruct(images[0], batch_size=1).images) == 1


def test_detokenize_at_another_size(ar_pipe):
    tokens = ar_pipe.tokenize(photograph())
    reconstruction = ar_pipe.vq_model.decode(image_tokens=tokens).reconstruction
    for resize_mode in ("generation", "reconstruction"):
        expected = ar_pipe.image_processor.postprocess(reconstruction, "np", 20, resize_mode)
        actual = ar_pipe.detokenize(tokens, "np", size=20, resize_mode=resize_mode)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.int,
        lambda tokens: tokens.numpy().astype(np.uint16),
        list,
        lambda tokens: tuple(map(tuple, tokens.tolist())),
        lambda tokens: Dataset.from_dict({"image_tokens": tokens.tolist()})["image_tokens"],
    ],
)
def test_detokenize_takes_tokens_in_whatever_holds_them(ar_pipe, convert):
    tokens = torch.randint(64, (2, 9))
    expected = ar_pipe.detokenize(tokens, "np")
    np.testing.assert_array_equal(ar_pipe.detokenize(convert(tokens), "np"), expected)


@pytest.mark.parametrize("convert", [torch.Tensor.clone, torch.Tensor.tolist, torch.Tensor.numpy])
def test_a_single_sequence_is_a_batch_of_one(ar_pipe, convert):
    tokens = torch.randint(64, (9,))
    np.testing.assert_array_equal(ar_pipe.detokenize(convert(tokens), "np"), ar_pipe.detokenize(tokens[None], "np"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0.5] * 9], "integers, got float64"),
        (torch.zeros(1, 9), "integers, got torch.float32"),
        ([["a"] * 9], "integers, got <U1"),
        ([[0] * 9, [0] * 8], "unequal numbers"),
        ([], "no image tokens"),
        ([0] * 8, "9 tokens per image, got 8"),
        (np.zeros((1, 3, 3), np.int64), "of shape"),
    ],
)
def test_what_detokenize_refuses(ar_pipe, tokens, message):
    with pytest.raises(ValueError, match=message):
        ar_pipe.detokenize(tokens)


@torch.no_grad()
def test_offloaded_models(pipe):
    images = [photograph(), photograph(1)]
    expected = pipe.tokenize(images), pipe.reconstruct(images, "np").images, pipe(0, generator=seeds(0)).images[0]
    for model in (pipe.vq_model, pipe.transformer):
        cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert torch.equal(pipe.tokenize(images), expected[0])
    np.testing.assert_array_equal(pipe.reconstruct(images, "np").images, expected[1])
    np.testing.assert_array_equal(pipe(0, generator=seeds(0)).images[0], expected[2])


def test_nothing_to_do_is_an_error(ar_pipe):
    with pytest.raises(ValueError, match="no images"):
        ar_pipe.tokenize([])
    with pytest.raises(ValueError, match="no image tokens"):
        ar_pipe.detokenize(torch.zeros(0, 9, dtype=torch.int64))


def test_the_decoder_runs_in_its_own_dtype(ar_pipe):
    ar_pipe.vq_model.to(torch.bfloat16)
    assert ar_pipe.transformer.dtype == torch.float32
    image = ar_pipe(0, generator=seeds(0), output_type="np").images
    assert image.dtype == np.float32
    assert ar_pipe.reconstruct(photograph()).images[0].size == (32, 32)


# -- saving and loading


def test_save_load_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = VFMTokPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is type(pipe.transformer)
    assert loaded.id2label == pipe.id2label == ID2LABEL
    for name in ("vq_model", "transformer"):
        for key, weight in getattr(pipe, name).state_dict().items():
            assert torch.equal(getattr(loaded, name).state_dict()[key], weight), key
    expected = pipe("heart", generator=seeds(0), output_type="np").images
    np.testing.assert_array_equal(loaded("heart", generator=seeds(0), output_type="np").images, expected)


def test_model_index_names_the_classes_of_its_own_code(ar_pipe, rar_pipe, tmp_path):
    index = {}
    for kind, pipe in (("ar", ar_pipe), ("rar", rar_pipe)):
        pipe.save_pretrained(tmp_path / kind)
        index[kind] = json.loads((tmp_path / kind / "model_index.json").read_text())
        assert index[kind]["_class_name"] == ["pipeline", "VFMTokPipeline"]
        assert index[kind]["vq_model"] == ["component_vfmtok", "VFMTokModel"]
        assert index[kind]["image_processor"] == ["component_vfmtok", "VFMTokImageProcessor"]
        assert index[kind]["id2label"] == {str(class_id): name for class_id, name in ID2LABEL.items()}
    assert index["ar"]["transformer"] == ["component_vfmtok", "VFMTokARForImageGeneration"]
    assert index["rar"]["transformer"] == ["component_vfmtok", "VFMTokRARForImageGeneration"]


def test_half_precision_files_load_as_float32_unless_asked(ar_pipe, tmp_path):
    ar_pipe.to(torch.float16).save_pretrained(tmp_path)
    loaded = VFMTokPipeline.from_pretrained(tmp_path)
    assert loaded.vq_model.dtype == loaded.transformer.dtype == torch.float32
    asked = VFMTokPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert asked.vq_model.dtype == asked.transformer.dtype == torch.float16
    # The older name, of which diffusers warns once it knows the newer one.
    warned = pytest.warns(FutureWarning, match="torch_dtype") if DTYPE == "dtype" else nullcontext()
    with warned:
        assert VFMTokPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16).dtype == torch.float16


def test_the_image_tokenizer_loads_alone(ar_pipe, tmp_path):
    ar_pipe.save_pretrained(tmp_path)
    alone = VFMTokPipeline.from_pretrained(tmp_path, transformer=None)
    assert torch.equal(alone.tokenize(photograph()), ar_pipe.tokenize(photograph()))
    with pytest.raises(ValueError, match="has no generator"):
        alone(0)


@pytest.mark.parametrize("overrides", [{"num_image_tokens": 16}, {"codebook_size": 32}])
def test_components_that_do_not_belong_together_are_refused(overrides):
    with pytest.raises(ValueError, match=f"another image tokenizer.*{next(iter(overrides))}"):
        VFMTokPipeline(tiny_model(), tiny_generator(**overrides), VFMTokImageProcessor(size=32))


# -- editing by tokens


def test_inpainting_keeps_the_tokens_outside_the_mask(rar_pipe):
    images = [photograph(0), photograph(1)]
    redraw = torch.zeros(9, dtype=torch.bool)
    redraw[[0, 4, 7]] = True
    before = rar_pipe.tokenize(images)
    after = rar_pipe.inpaint(images, "heart", redraw, generator=seeds(0, 1), output_type="tokens").images
    assert torch.equal(after[:, ~redraw], before[:, ~redraw])
    assert (after[:, redraw] != before[:, redraw]).any()
    alone = rar_pipe.inpaint(images[1], "heart", redraw, generator=seeds(1), output_type="tokens").images
    assert torch.equal(after[1:], alone)
    assert len(rar_pipe.inpaint(images, [0, 1], redraw).images) == 2


def test_drawn_tokens_depend_on_all_kept_ones(rar_pipe):
    """Raster order could not do this: the only token drawn is the first, and the last one kept changes it."""
    redraw = torch.arange(9) == 0
    tokens = rar_pipe.tokenize(photograph()).repeat(64, 1)
    tokens[:, -1] = torch.arange(64)
    drawn = rar_pipe.transformer.generate(
        torch.zeros(64, dtype=torch.int64), image_tokens=tokens, keep_mask=~redraw, do_sample=False
    )
    assert len(drawn[:, 0].unique()) > 1


def test_a_mask_is_cropped_and_rounded_like_the_image(rar_pipe):
    mask = np.zeros((32, 64), dtype=np.uint8)  # the crop keeps columns 16 to 47
    mask[:, :16] = 255
    assert not rar_pipe.token_mask(mask).any()
    mask[:12, 16:27] = 255  # the upper left cell of 3 x 3, roughly
    for picture in (mask, PIL.Image.fromarray(mask)):
        assert rar_pipe.token_mask(picture).tolist() == [True] + [False] * 8


def test_transparent_pixels_of_a_mask_are_not_marked(rar_pipe):
    """An editor exports the layer of a mask with white strokes on transparent white."""
    layer = PIL.Image.new("RGBA", (30, 30), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 20, 30, 30))
    encoded = io.BytesIO()
    layer.save(encoded, "PNG")
    for mask in (layer, encoded.getvalue(), np.asarray(layer), layer.convert("LA")):
        assert rar_pipe.token_mask(mask).tolist() == [False] * 6 + [True] * 3


@pytest.mark.parametrize(
    ("mask_size", "image_size"),
    [((20, 31), (40, 61)), ((40, 61), (20, 31)), ((4000, 6000), (427, 640)), ((32, 32), (40, 60)), ((3, 3), (99, 9))],
)
def test_a_mask_has_the_shape_of_its_image_or_of_the_crop(rar_pipe, mask_size, image_size):
    mask = np.ones(mask_size, dtype=bool)
    assert len(rar_pipe.inpaint(photograph(0, *image_size), 0, mask, output_type="tokens").images) == 1


@pytest.mark.parametrize(
    ("mask_size", "image_size"), [((20, 33), (40, 61)), ((40, 60), (32, 32)), ((40, 61), (61, 40))]
)
def test_a_mask_of_another_shape_would_mark_another_place(rar_pipe, mask_size, image_size, monkeypatch):
    monkeypatch.setattr(rar_pipe.vq_model, "encode", None)  # nothing is encoded
    with pytest.raises(
        ValueError, match=r"mask has \d+ x \d+ pixels and its image \d+ x \d+, so the crop would move it"
    ):
        rar_pipe.inpaint([photograph(0, *image_size)], 0, np.ones(mask_size, dtype=bool))


@pytest.mark.parametrize("convert", [torch.Tensor.clone, torch.Tensor.numpy])
def test_a_mask_of_tokens_comes_from_any_library(rar_pipe, convert):
    redraw = torch.arange(9) < 3
    assert torch.equal(rar_pipe.token_mask(convert(redraw)), redraw)
    assert len(rar_pipe.inpaint(photograph(), 0, convert(redraw)).images) == 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(9), r"mask of tokens must be bool of shape \(9,\), got torch.float32 of shape \(9,\)"),
        (torch.arange(9), "mask of tokens must be bool .* got torch.int64"),
        (np.ones(8, dtype=bool), r"mask of tokens must be bool .* of shape \(8,\)"),
        (torch.ones(2, 9, dtype=torch.bool), r"The mask has 9 x 2 pixels, fewer than the 3 x 3 tokens.*\(9,\)"),
        (torch.ones(1, 9, dtype=torch.bool), "The mask has 9 x 1 pixels"),
        ([np.ones((40, 50), dtype=bool)] * 2, "Got 2 masks: pass one for all images"),
        (torch.ones(2, 1, 40, 50), "Got 2 masks"),
        ([], "Got 0 masks"),
        (np.full((40, 50), 2.0), r"The mask cannot be used: Float images must be in \[0, 1\]"),
        (torch.ones(40, 50, dtype=torch.int64), "The mask cannot be used: Images of int64"),
        (None, "The mask cannot be used: .*empty"),
        (b"no image", "The mask cannot be used: .*unknown"),
    ],
)
def test_masks_that_are_refused(rar_pipe, mask, message, monkeypatch):
    monkeypatch.setattr(rar_pipe, "tokenize", None)  # nothing is tokenized
    with pytest.raises((ValueError, TypeError), match=message):
        rar_pipe.inpaint([photograph(0), photograph(1)], 0, mask)


def test_inpainting_refuses(ar_pipe, rar_pipe, monkeypatch):
    for refusing in (ar_pipe, rar_pipe):
        monkeypatch.setattr(refusing, "tokenize", None)  # nothing is tokenized
    redraw = torch.arange(9) < 3
    with pytest.raises(ValueError, match="only in raster order.*RAR"):
        ar_pipe.inpaint(photograph(), 0, redraw)
    with pytest.raises(ValueError, match="marks no token"):
        rar_pipe.inpaint(photograph(), 0, np.zeros((40, 50), dtype=np.uint8))
    with pytest.raises(ValueError, match="2 class labels for 3 images"):
        rar_pipe.inpaint([photograph()] * 3, [0, 1], redraw)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        rar_pipe.inpaint([photograph()] * 2, 0, redraw, generator=seeds(0))
    with pytest.raises(ValueError, match="decode_batch_size must be at least 1"):
        rar_pipe.inpaint(photograph(), 0, redraw, decode_batch_size=0)
