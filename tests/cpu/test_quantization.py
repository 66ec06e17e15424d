"""Quantized by the ecosystem's own way in, packed for the CPU: equal up to bfloat16, and back to the last bit."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import TorchAoConfig

from tests.modeling.generators import tiny_ar, tiny_batch, tiny_rar
from tests.testing import tiny_model
from vfmtok_hf import VFMTokModel
from vfmtok_hf.cpu.packing import pack_weights, unpack_weights
from vfmtok_hf.cpu.quantization import PackedInt4Linear, PackedInt8Linear, PackedQuantizedLinear


torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install vfmtok-hf[quantization]")

INT8 = torchao.Int8WeightOnlyConfig()
INT4 = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
LAYERS = {"int8": (INT8, PackedInt8Linear), "int4": (INT4, PackedInt4Linear)}

# Activations of the packed layers are rounded to bfloat16, scales as well: 8 bits, errors of up to 2^-9 each.
BFLOAT16 = {"rtol": 0.02, "atol": 0.02}


def quantized_linear(config, inputs: int = 64, outputs: int = 48, bias: bool = True, dtype=torch.float32) -> nn.Linear:
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype))
    torchao.quantize_(model, config)
    return model[0]


def reload_quantized(model, config, folder, **kwargs):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=TorchAoConfig(config), **kwargs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 7, 64), (40, 64), (0, 64)])
@torch.no_grad()
def test_packed_layer_computes_what_torchao_does(kind, dtype, shape):
    config, packed_class = LAYERS[kind]
    linear, inputs = quantized_linear(config, dtype=dtype), torch.randn(shape, dtype=dtype)
    packed = pack_weights(nn.Sequential(linear))[0]
    assert isinstance(packed, packed_class)
    output = packed(inputs)
    assert output.dtype == dtype
    torch.testing.assert_close(output, inputs @ linear.weight.dequantize().T + linear.bias, **BFLOAT16)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_unpacked_layer_has_torchaos_tensor_to_the_last_bit(kind):
    linear = quantized_linear(LAYERS[kind][0], inputs=160, bias=False)
    model = unpack_weights(pack_weights(nn.Sequential(copy.deepcopy(linear))))
    weight = model[0].weight
    assert type(weight) is type(linear.weight)
    for name in linear.weight.tensor_data_names:
        assert getattr(weight, name).equal(getattr(linear.weight, name))
    assert weight.block_size == linear.weight.block_size
    assert weight.dtype == linear.weight.dtype


def test_asymmetric_groups():
    """Groups with a zero point of their own, which the 4 bit kernel takes as an offset."""
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=torchao.PerGroup(32), mapping_type=torchao.MappingType.ASYMMETRIC
    )
    linear = nn.Linear(64, 48, bias=False)
    nn.init.uniform_(linear.weight, 0, 1)
    model = nn.Sequential(linear)
    torchao.quantize_(model, config)
    inputs, weight = torch.randn(3, 64), model[0].weight
    assert weight.zero_point.any()
    with torch.no_grad():
        packed = pack_weights(model)(inputs)
    assert isinstance(model[0], PackedInt4Linear)
    # weights of one sign: nibble and offset cancel, and each is rounded
    torch.testing.assert_close(packed, inputs @ weight.dequantize().T, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    ("config", "inputs", "outputs"),
    [
        (INT8, 60, 48),  # the 8 bit kernel reads past the end of such rows
        (INT4, 64, 40),
        (torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(32)), 64, 48),
        (torchao.Int8DynamicActivationInt8WeightConfig(), 64, 48),
        (torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=torchao.PerGroup(32)), 64, 48),
        (torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)), 64, 48),
    ],
)
def test_layers_without_kernel_stay_with_torchao(config, inputs, outputs):
    linear = quantized_linear(config, inputs, outputs)
    assert pack_weights(nn.Sequential(linear))[0] is linear


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_pickles(kind):
    packed, inputs = LAYERS[kind][1](quantized_linear(LAYERS[kind][0])), torch.randn(2, 64)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):  # noqa: S301
        assert torch.equal(twin(inputs), packed(inputs))


def test_packed_layers_say_what_they_cannot_do():
    packed = PackedInt8Linear(quantized_linear(INT8))
    with pytest.raises(RuntimeError, match="unpack_weights"):
        packed(torch.randn(1, 64, requires_grad=True))
    with pytest.raises(RuntimeError, match="unpack_weights"):
        packed.to(torch.float16)
    assert packed.to("cpu") is packed


@pytest.mark.parametrize("tiny_generator", [tiny_ar, tiny_rar])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_generators_load_quantized_save_and_reload(tmp_path, tiny_generator, kind):
    config, packed_class = LAYERS[kind]
    # sizes that the kernels take
    model = reload_quantized(tiny_generator(hidden_size=64, intermediate_size=128), config, tmp_path / "plain")
    class_labels, image_tokens = tiny_batch(model)
    for name in ("class_embedding", "embed_tokens", "lm_head"):
        if hasattr(model, name):
            assert type(getattr(model, name).weight) is nn.Parameter
    expected = model(class_labels, image_tokens).logits

    pack_weights(model)
    assert any(isinstance(module, packed_class) for module in model.modules())
    packed = model(class_labels, image_tokens).logits
    assert (packed - expected).norm() / expected.norm() < 0.02  # bfloat16 activations in every layer
    model.save_pretrained(tmp_path / "quantized")

    reloaded = type(model).from_pretrained(tmp_path / "quantized")
    assert not any(isinstance(module, PackedQuantizedLinear) for module in reloaded.modules())
    assert reloaded(class_labels, image_tokens).logits.equal(expected)
    assert unpack_weights(model)(class_labels, image_tokens).logits.equal(expected)


@torch.no_grad()
def test_image_tokenizer_quantizes_when_asked(tmp_path):
    model = reload_quantized(tiny_model().eval(), INT8, tmp_path / "plain")
    quantized = {name for name, weight in model.named_parameters() if isinstance(weight, torchao.Int8Tensor)}
    assert any(name.startswith("vit_decoder") for name in quantized)
    image_tokens = torch.zeros(1, model.config.num_anchors, dtype=torch.int64)
    expected = model.decode(image_tokens).reconstruction
    model.save_pretrained(tmp_path / "quantized")
    reloaded = VFMTokModel.from_pretrained(tmp_path / "quantized")
    assert reloaded.decode(image_tokens).reconstruction.equal(expected)


def test_pipeline_quantizes_the_components_that_are_named(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install vfmtok-hf[pipeline]")
    from vfmtok_hf import DEFAULT_CHECKPOINT
    from vfmtok_hf.pipelines import VFMTokPipeline

    config = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(INT8)})
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT, quantization_config=config)
    assert any(isinstance(weight, torchao.Int8Tensor) for weight in pipe.transformer.parameters())
    assert all(type(weight) is nn.Parameter for weight in pipe.vq_model.parameters())
    pack_weights(pipe.transformer)
    pipe.save_pretrained(tmp_path)

    reloaded = VFMTokPipeline.from_pretrained(tmp_path)
    pack_weights(reloaded.transformer)
    draw = lambda pipe: pipe(3, generator=torch.Generator().manual_seed(0), output_type="tokens").images  # noqa: E731
    assert torch.equal(torch.as_tensor(draw(reloaded)), torch.as_tensor(draw(pipe)))
