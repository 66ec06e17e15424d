import pytest
import torch

from tests.testing import tiny_images, tiny_model
from vfmtok_hf.cpu.attention import BLOCKWISE_ATTENTION
from vfmtok_hf.cpu.packing import has_product
from vfmtok_hf.cpu.training import FrozenProduct
from vfmtok_hf.data.loaders import EpochSampler
from vfmtok_hf.training import generator_training, tokenizer_training
from vfmtok_hf.training.arguments import GeneratorArguments, TokenizerArguments, save_arguments


# -- the output of a run


@pytest.mark.parametrize(
    ("trainer", "arguments_class"),
    [(tokenizer_training, TokenizerArguments), (generator_training, GeneratorArguments)],
)
def test_a_run_is_continued_only_on_request_and_with_its_arguments(trainer, arguments_class, tmp_path):
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    save_arguments(arguments_class(train_data="", output=str(tmp_path), batch_size=3), tmp_path / "arguments.yaml")
    with pytest.raises(ValueError, match="already contains a run: pass --resume true"):
        trainer.train(arguments_class(train_data="", output=str(tmp_path), batch_size=3))
    with pytest.raises(ValueError, match="--batch_size 3 -> 4"):
        trainer.train(arguments_class(train_data="", output=str(tmp_path), batch_size=4, resume=True))


# -- layers of a tokenizer


def set_up(model, trainable="all", **settings):
    arguments = TokenizerArguments(train_data="", output="", perceptual_weight=0, trainable=trainable, **settings)
    objective = tokenizer_training.build_objective(model, arguments)
    tokenizer_training.set_up_layers(objective, arguments, torch.device("cpu"))
    layers = [vars(module).get("forward") for module in model.vision_model.modules()]
    return {layer.dtype for layer in layers if isinstance(layer, FrozenProduct)}


@pytest.mark.parametrize(("precision", "vision"), [("no", "sdpa"), ("bf16", "eager")])
def test_layers_of_a_tokenizer(precision, vision):
    """Nothing is dropped in the frozen vision model, and its features are those that autocast alone gives."""
    model, images = tiny_model(decoder_dropout=0.1), tiny_images()
    model.set_attn_implementation({"": "sdpa", "vision_config": vision})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def features(enabled: bool) -> list[torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return model.extract_vision_features(images)

    expected = {enabled: features(enabled) for enabled in (False, True)}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert set_up(model, mixed_precision=precision) == ({dtype} if has_product(dtype) else set())
    assert model.config._attn_implementation == BLOCKWISE_ATTENTION
    assert model.vision_model.config._attn_implementation == vision
    for enabled in (False, True):
        torch.testing.assert_close(features(enabled), expected[enabled])
    assert model.state_dict().keys() == weights.keys()
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())


def test_a_frozen_encoder_is_set_up_for_the_precision_it_computes_in():
    model = tiny_model()
    assert set_up(model, trainable="decoder", mixed_precision="bf16") == {torch.float32}
    assert model.vision_model.config._attn_implementation == "sdpa"


def test_a_compiled_tokenizer_keeps_its_layers():
    assert set_up(tiny_model(), compile=True) == set()


# -- order of images


def test_epochs_differ_and_are_repeatable():
    sampler = EpochSampler([0] * 20)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(sampler) == first


def test_balancing_makes_classes_equally_likely():
    sampler = EpochSampler([0] * 900 + [1] * 100, balance_power=1.0)
    drawn = [index >= 900 for epoch in range(20) if sampler.set_epoch(epoch) is None for index in sampler]
    # 20,000 draws at p = 1/2 scatter by 0.0035; four times that.
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.014)
