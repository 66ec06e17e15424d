"""Linear layers of compiled steps on CPUs."""

import copy

import pytest
import torch
from torch import nn

from tests.modeling.generators import tiny_ar, tiny_rar
from vfmtok_hf.cpu.compiling import RowSumLinear, use_row_sums
from vfmtok_hf.cpu.packing import PackedLinear, pack_weights


@pytest.mark.parametrize("make_model", [tiny_ar, tiny_rar])
def test_compiled_steps_of_a_row_multiply_no_matrices_by_it(make_model):
    linears = []

    def backend(graph, inputs):
        linears.append([node for node in graph.graph.nodes if node.target is nn.functional.linear])
        return graph.forward

    model = make_model()
    expected = model.generate([3], do_sample=False)
    torch._dynamo.reset()
    model.compile_decoding(backend=backend)
    assert torch.equal(model.generate([3], do_sample=False), expected)
    assert linears
    assert not any(linears)
    model.generate([0, 3])
    assert len(linears[-1]) > 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_row_equals_the_matmul(dtype, bias):
    layer, row = nn.Linear(40, 30, bias, dtype=dtype), torch.randn(1, 1, 40, dtype=dtype)
    expected = layer(row)
    use_row_sums(layer)
    assert torch.equal(layer(row), expected)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(row), expected)


def test_other_layers_stay():
    class OtherLinear(nn.Linear):
        pass

    layers = nn.ModuleList([OtherLinear(2, 2), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)])
    state = copy.deepcopy(layers.state_dict())
    assert use_row_sums(layers) is layers
    assert [type(layer) for layer in layers] == [OtherLinear, nn.Linear, RowSumLinear]
    assert layers.state_dict().keys() == state.keys()
    assert torch.equal(layers[2].weight, state["2.weight"])


def test_layers_of_a_compiled_model_can_be_packed():
    layers = nn.ModuleList([nn.Linear(4, 4)])
    pack_weights(use_row_sums(layers))
    assert type(layers[0]) is PackedLinear
