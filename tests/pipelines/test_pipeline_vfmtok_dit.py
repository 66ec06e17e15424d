"""The diffusion pipeline: its samples against the original's, guidance, callbacks, output types, round trips."""

import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from tests.modeling.generators import tiny_dit
from tests.pipelines.tiny_pipeline import ID2LABEL, tiny_dit_pipeline
from tests.testing import REFERENCE, REFERENCE_TOKENIZER_CONFIG, reference_tensors, tiny_vfmae
from vfmtok_hf import VFMAEModel, VFMTokDiTForImageGeneration, VFMTokDiTPipeline, VFMTokImageProcessor, VFMTokPipeline
from vfmtok_hf.conversion import convert_dit, convert_vfmae
from vfmtok_hf.pipelines.pipeline_vfmtok_dit import released_scheduler


@pytest.fixture
def pipe():
    return tiny_dit_pipeline()


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def photograph(seed=0, height=40, width=50):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# -- the original's samples; bounds are those of the reference's README


CASES = {
    "none": {},
    "cfg1.45": {"guidance_scale": 1.45},
    "cfg4.0_interval_0.3_0.8": {"guidance_scale": 4.0, "guidance_interval": (0.3, 0.8)},
    "autoguidance1.37": {"guidance_scale": 1.37},
    "autoguidance2.5_interval_0.2_0.9": {"guidance_scale": 2.5, "guidance_interval": (0.2, 0.9)},
}


@pytest.fixture(scope="module")
def tensors():
    return reference_tensors("ditdh")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The reference's pipeline, with its network for autoguidance."""
    root = tmp_path_factory.mktemp("original")
    convert_vfmae(
        REFERENCE / "vfmae" / "vfmae.pt",
        root / "vae",
        vision_checkpoint=REFERENCE / "vfmae" / "backbone.pt",
        latent_statistics=REFERENCE / "vfmae" / "stats.pt",
        config=REFERENCE_TOKENIZER_CONFIG,
    )
    for name in ("ditdh", "ditdh_guidance"):
        convert_dit(REFERENCE / "ditdh" / f"{name}.pt", root / name)
    pipe = VFMTokDiTPipeline(
        VFMAEModel.from_pretrained(root / "vae"),
        VFMTokDiTForImageGeneration.from_pretrained(root / "ditdh"),
        released_scheduler(),
        VFMTokImageProcessor(size=256),
        VFMTokDiTForImageGeneration.from_pretrained(root / "ditdh_guidance"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(original, tensors, case, num_inference_steps):
    """Normalized latents after each step, the noise first, and the times at which the denoiser was asked."""
    trajectory, times = [tensors["sample.noise"]], []
    hook = original.transformer.register_forward_pre_hook(lambda module, args: times.append(args[1][0].item()))
    pipe = original
    if not case.startswith("auto"):
        components = {**original.components, "guidance_transformer": None}
        pipe = VFMTokDiTPipeline(**components)
        pipe.set_progress_bar_config(disable=True)
    pipe(
        tensors["sample.labels"],
        num_inference_steps=num_inference_steps,
        latents=tensors["sample.noise"],
        output_type="latent",
        callback_on_step_end=lambda *arguments: trajectory.append(arguments[3]["latents"].clone()),
        **CASES[case],
    )
    hook.remove()
    return torch.stack(trajectory), times


@pytest.mark.parametrize("case", CASES)
def test_samples_are_the_originals(case, original, tensors):
    for num_steps, key in ((1, "sample.steps2"), (9, "sample.steps10"), (99, "sample.steps100")):
        trajectory, times = sample(original, tensors, case, num_steps)
        assert len(trajectory) == num_steps + 1
        # The last time of the grid is never asked about.
        torch.testing.assert_close(torch.tensor(times), tensors[f"{key}.times"][:-1], atol=1e-7, rtol=0)
        if f"{key}.{case}.final" in tensors:
            torch.testing.assert_close(trajectory[-1], tensors[f"{key}.{case}.final"], atol=5e-5, rtol=0)
        if f"{key}.{case}.trajectory" in tensors:
            torch.testing.assert_close(trajectory, tensors[f"{key}.{case}.trajectory"], atol=5e-5, rtol=0)
        if f"f64.{key}.{case}.final" in tensors:
            expected = tensors[f"f64.{key}.{case}.final"].float()
            torch.testing.assert_close(trajectory[-1], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("interval", ["", "_interval_0.3_0.8"])
@pytest.mark.parametrize(("case", "scale"), [("cfg2.5", 2.5), ("autoguidance1.8", 1.8)])
@torch.no_grad()
def test_guided_predictions_are_the_originals(case, scale, interval, original, tensors):
    """One evaluation of images of different times, some of them outside of the interval."""
    expected = tensors[f"guided.{case}{interval}"][:4]
    latents, times, labels = (tensors[f"forward.{name}"][:4] for name in ("x", "t", "labels"))
    components = {**original.components}
    if case.startswith("cfg"):
        components["guidance_transformer"] = None
    pipe = VFMTokDiTPipeline(**components)
    for index, time in enumerate(times):
        is_guided = not interval or 0.3 <= time <= 0.8
        velocity = pipe._velocity(
            latents[index : index + 1], time, labels[index : index + 1], scale if is_guided else 1.0
        )
        torch.testing.assert_close(velocity[0], expected[index], atol=2e-5, rtol=0)


@torch.no_grad()
def test_images_are_the_originals(original, tensors):
    arguments = {"num_inference_steps": 9, "guidance_scale": 1.37, "latents": tensors["sample.noise"]}
    latents = original(tensors["sample.labels"], output_type="latent", **arguments).images
    torch.testing.assert_close(latents, tensors["pipeline.latents_denormalised"], atol=5e-5, rtol=0)
    reconstruction = original.vae.decode(tensors["pipeline.latents_denormalised"]).reconstruction[:, :, ::8, ::8]
    torch.testing.assert_close(reconstruction, tensors["pipeline.recon.stride8"], atol=1e-3, rtol=0)
    expected = tensors["f64.pipeline.recon.stride8"].float()
    torch.testing.assert_close(reconstruction, expected, atol=5e-5, rtol=0)
    images = np.stack([np.asarray(image) for image in original(tensors["sample.labels"], **arguments).images])
    difference = np.abs(images[:, ::8, ::8].astype(int) - tensors["pipeline.images.stride8"].numpy().astype(int))
    # What float32 against float64 changes, says the README.
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.01


def test_the_schedule_shifts_once_and_does_not_go_to_zero(pipe):
    times = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: times.append(args[1][0].item()))
    pipe(0, output_type="latent")
    assert len(times) == 99
    assert times[0] == 1
    assert pipe.scheduler.sigmas[-2].item() == pytest.approx(0.004 / 1.003, abs=1e-6)


# -- sampling


def test_labels_are_found_by_number_and_by_any_synonym(pipe):
    assert pipe.get_label_ids(["smiley", 1, "4", "ailurus"]) == [0, 1, 4, 4]
    with pytest.raises(ValueError, match="no class 'hart'.*Did you mean 'heart'"):
        pipe("hart")


def test_output_types_agree(pipe):
    arguments = {"num_inference_steps": 2}
    outputs = {
        output_type: pipe([0, "heart"], generator=seeds(0, 1), output_type=output_type, **arguments).images
        for output_type in ("latent", "pil", "np", "pt")
    }
    assert outputs["latent"].shape == (2, 4, 3, 3)
    assert [picture.size for picture in outputs["pil"]] == [(32, 32)] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in outputs["pil"]]), np.rint(outputs["np"] * 255))
    np.testing.assert_allclose(outputs["np"].transpose(0, 3, 1, 2), outputs["pt"].numpy())
    assert torch.equal(pipe.decode(outputs["latent"], "pt"), outputs["pt"])
    (images,) = pipe([0, "heart"], generator=seeds(0, 1), output_type="latent", return_dict=False, **arguments)
    assert torch.equal(images, outputs["latent"])


def test_a_seed_gives_the_same_image_in_any_batch(pipe):
    arguments = {"num_inference_steps": 3, "guidance_scale": 1.5, "output_type": "latent"}
    together = pipe([0, 1], num_images_per_label=2, generator=seeds(*range(4)), **arguments).images
    alone = [pipe(label, generator=seeds(i), **arguments).images for i, label in enumerate([0, 0, 1, 1])]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert torch.equal(pipe([0, 1], 2, generator=tuple(seeds(*range(4))), **arguments).images, together)


@pytest.mark.parametrize(("guidance", "evaluations"), [(False, [2, 2]), (True, [1, 1])])
def test_without_guidance_the_denoiser_runs_alone(guidance, evaluations):
    pipe = tiny_dit_pipeline(guidance)
    sizes = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    pipe(0, num_inference_steps=2)
    assert sizes == [1, 1]
    sizes.clear()
    pipe(0, num_inference_steps=2, guidance_scale=2.0)
    assert sizes == evaluations
    sizes.clear()
    pipe(0, num_inference_steps=2, guidance_scale=2.0, guidance_interval=(0.0, 0.1))
    assert sizes == [1, 1]


def test_callbacks(pipe):
    steps = []

    def remember(called_pipe, step, timestep, tensors):
        assert called_pipe is pipe
        steps.append((step, timestep.item(), tensors["latents"].shape))
        if step == 1:
            return {"latents": torch.zeros_like(tensors["latents"])}
        called_pipe._interrupt = step == 2

    latents = pipe([0, 1], num_inference_steps=5, callback_on_step_end=remember, output_type="latent").images
    assert [step for step, _, _ in steps] == [0, 1, 2]
    assert steps[0][1:] == (1000, (2, 4, 3, 3))
    assert pipe.interrupt
    # Only one step was taken from the zeros that the callback gave.
    assert latents.abs().max() > 0
    seen = []
    pipe(
        0,
        num_inference_steps=2,
        callback_on_step_end=lambda *a: seen.append(a[3]),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}, {}]
    assert not pipe.interrupt
    with pytest.raises(TypeError, match="returns a dictionary or None, got Tensor"):
        pipe(0, num_inference_steps=2, callback_on_step_end=lambda *arguments: arguments[3]["latents"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_type": "tokens"}, "output_type must be 'pil', 'np', 'pt', 'uint8' or 'latent'"),
        ({"num_images_per_label": 0}, "num_images_per_label must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"generator": seeds(0, 1)}, "2 generators for 1 images"),
        ({"latents": torch.zeros(2, 4, 3, 3)}, r"latents must have shape \(1, 4, 3, 3\)"),
        ({"callback_on_step_end_tensor_inputs": ["image_tokens"]}, r"may contain \['latents'\]"),
    ],
)
def test_bad_arguments_are_refused(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe(0, **kwargs)


def test_components_that_do_not_go_together_are_refused(pipe):
    components = pipe.components
    with pytest.raises(ValueError, match=r"another autoencoder: its latents have shape \(8, 3, 3\)"):
        VFMTokDiTPipeline(**{**components, "transformer": tiny_dit(latent_channels=8)})
    with pytest.raises(
        ValueError, match="guidance_transformer does not go with transformer: its num_classes is 3, not 5"
    ):
        VFMTokDiTPipeline(**{**components, "guidance_transformer": tiny_dit(num_classes=3)})


def test_damaged_weights_are_reported(pipe):
    next(pipe.transformer.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        pipe(0, num_inference_steps=1)


# -- images <-> latents


@torch.no_grad()
def test_reconstruct_is_encode_then_decode(pipe):
    images = [photograph(0), photograph(1), photograph(2, 33, 77)]
    latents = pipe.encode(images)
    pixel_values = pipe.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(latents, pipe.vae.encode(pixel_values).latents)
    torch.testing.assert_close(latents, pipe.encode(images, batch_size=2), atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(pipe.reconstruct(images, output_type="np").images, pipe.decode(latents, "np"))
    assert torch.equal(pipe.reconstruct(images, output_type="latent").images, latents)
    assert pipe.decode(latents[:1], "pt", size=20).shape == (1, 3, 20, 20)
    with pytest.raises(ValueError, match="no latents"):
        pipe.decode(latents[:0])
    with pytest.raises(ValueError, match="no images"):
        pipe.encode([])


# -- saving, loading, offloading


def test_saved_pipelines(tmp_path):
    pipe = tiny_dit_pipeline(guidance=True)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["_class_name"] == ["dit_pipeline", "VFMTokDiTPipeline"]
    loaded = VFMTokDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.id2label == ID2LABEL
    assert loaded.scheduler.config.shift == 4
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    expected = pipe(0, generator=seeds(0), **arguments).images
    torch.testing.assert_close(loaded(0, generator=seeds(0), **arguments).images, expected)
    assert VFMTokDiTPipeline.from_pretrained(tmp_path, guidance_transformer=None).guidance_transformer is None
    without = VFMTokDiTPipeline.from_pretrained(tmp_path, transformer=None, guidance_transformer=None)
    assert len(without.reconstruct(photograph()).images) == 1
    with pytest.raises(ValueError, match="without a denoiser"):
        without(0)
    with pytest.raises(ValueError, match="This is a VFMTokDiTPipeline, not a VFMTokPipeline"):
        VFMTokPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a whole pipeline: load its VFMAEModel with subfolder='vae'"):
        VFMAEModel.from_pretrained(tmp_path)


def test_an_autoencoder_alone(tmp_path):
    tiny_vfmae().save_pretrained(tmp_path)
    VFMTokImageProcessor(size=32).save_pretrained(tmp_path)
    pipe = VFMTokDiTPipeline.from_autoencoder(tmp_path)
    assert len(pipe.reconstruct([photograph(), photograph(1)]).images) == 2


@torch.no_grad()
def test_offloaded_models(pipe):
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    expected = pipe(0, generator=seeds(0), **arguments).images
    images = pipe.decode(expected, "np")
    for model in (pipe.vae, pipe.transformer):
        cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(pipe(0, generator=seeds(0), **arguments).images, expected)
    np.testing.assert_array_equal(pipe.decode(expected, "np"), images)


def test_class_names_of_a_nameless_denoiser():
    components = {**tiny_dit_pipeline().components, "transformer": tiny_dit()}
    pipe = VFMTokDiTPipeline(**components, id2label=ID2LABEL)
    assert pipe.transformer.config.id2label == pipe.id2label == ID2LABEL
