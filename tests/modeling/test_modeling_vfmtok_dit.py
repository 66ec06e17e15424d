import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from tests.modeling.generators import tiny_dit
from vfmtok_hf import VFMTokDiTConfig, VFMTokDiTForImageGeneration
from vfmtok_hf.cpu.packing import pack_weights


def inputs(batch_size=2):
    return torch.randn(batch_size, 4, 3, 3), torch.rand(batch_size), torch.arange(batch_size)


def test_defaults_are_the_released_transformer():
    with torch.device("meta"):
        model = VFMTokDiTForImageGeneration(VFMTokDiTConfig())
    # Without the position table and the frequencies of the time, which are buffers here.
    assert sum(parameter.numel() for parameter in model.parameters()) == 834_517_364


def test_cost_of_an_evaluation():
    """What the documentation says: 0.32 TFLOP an image."""
    config = VFMTokDiTConfig()
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = VFMTokDiTForImageGeneration(config).eval()
        model(torch.empty(1, *config.latent_shape), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    assert counter.get_total_flops() == pytest.approx(0.32e12, rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 18}, "hidden_size 18 must give each of 2 num_attention_heads a multiple of 4"),
        ({"head_hidden_size": 18}, "head_hidden_size 18 must give each of 2 head_num_attention_heads"),
        ({"id2label": {0: "a"}}, "id2label must name each class"),
        ({"depth": 3}, "no field 'depth'"),
    ],
)
def test_config_refuses_contradictions(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_dit(**overrides)


@torch.no_grad()
def test_a_new_model_predicts_zero():
    model = VFMTokDiTForImageGeneration(tiny_dit().config)
    assert not model(*inputs()).velocity.any()
    assert model.position_embeddings.abs().max() <= 1
    assert model.time_embedding.frequencies.std() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_folders(dtype, tmp_path):
    model = tiny_dit()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is VFMTokDiTForImageGeneration
    assert loaded.dtype == dtype
    assert loaded.time_embedding.fc1.weight.dtype == loaded.time_embedding.frequencies.dtype == torch.float32
    assert torch.equal(loaded.time_embedding.frequencies, model.time_embedding.frequencies)
    assert torch.equal(loaded.position_embeddings, model.position_embeddings)
    arguments = inputs()
    expected = model(*arguments).velocity
    velocity = loaded(*arguments).velocity
    assert velocity.dtype == dtype
    difference = (velocity.float() - expected).abs().mean()
    assert difference <= (0 if dtype == torch.float32 else 0.03) * expected.abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("first", range(1, 11))
def test_parts_may_lie_on_two_devices(first):
    """As device maps place them. Here the parts from `first` on lie on the meta device, which computes shapes only."""
    model = tiny_dit()
    children = (child if isinstance(child, nn.ModuleList) else [child] for child in model.children())
    parts = [part for child in children for part in child]
    assert len(parts) == 11
    for part in parts[first:]:
        part.to("meta").register_forward_pre_hook(lambda _, args: tuple(value.to("meta") for value in args))
    velocity = model(*inputs()).velocity
    assert velocity.is_meta
    assert repr(model(*inputs())) == "VFMTokDiTOutput(velocity=float32[2, 4, 3, 3])"


@torch.no_grad()
def test_images_do_not_touch_each_other():
    model = tiny_dit()
    latents, times, labels = inputs()
    together = model(latents, times, labels).velocity
    alone = torch.cat([model(latents[i : i + 1], times[i : i + 1], labels[i : i + 1]).velocity for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none():
    model = tiny_dit(class_dropout=0.0).train()
    arguments = inputs()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(*arguments).velocity.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_training_drops_labels():
    model = tiny_dit(class_dropout=1.0)
    latents, times, labels = inputs()
    null = torch.full_like(labels, model.config.num_classes)
    with torch.no_grad():
        dropped = model.train()(latents, times, labels).velocity
        assert torch.equal(dropped, model.eval()(latents, times, null).velocity)
        assert not torch.equal(dropped, model(latents, times, labels).velocity)


@torch.no_grad()
def test_packed_weights_compute_the_same():
    model, arguments = tiny_dit(), inputs()
    expected = model(*arguments).velocity
    torch.testing.assert_close(pack_weights(model)(*arguments).velocity, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_classes_may_be_replaced():
    model = tiny_dit(id2label={0: "a", 1: "b", 2: "c", 3: "d", 4: "e"})
    latents, times, _ = inputs(1)
    before = model(latents, times, torch.tensor([1])).velocity
    assert model.resize_class_embeddings(["x", "b"]) == [None, 1]
    assert torch.equal(model(latents, times, torch.tensor([1])).velocity, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 4, 9)}, r"latents must have shape \(batch_size, 4, 3, 3\)"),
        ({"timesteps": torch.tensor(0.5)}, r"timesteps must have shape \(2,\)"),
        ({"class_labels": torch.zeros(3).long()}, r"class_labels must have shape \(2,\)"),
        ({"class_labels": torch.tensor([0, 6])}, "class_labels must lie in 0 to 5, got 6"),
        ({"class_labels": torch.zeros(2)}, "class_labels must be int64"),
    ],
)
def test_bad_inputs_are_refused(change, message):
    arguments = dict(zip(("latents", "timesteps", "class_labels"), inputs(), strict=True))
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_dit()(**{**arguments, **change})
