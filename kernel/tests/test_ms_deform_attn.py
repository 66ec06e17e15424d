"""The compiled operators against plain torch: values, gradients, tracing, and mismatched arguments."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from reference import ms_deform_attn_reference, random_inputs


pytestmark = [pytest.mark.kernel, pytest.mark.kernels_ci]

# Rounding of sums of at most a few hundred terms of size 1; half types round the inputs of the comparison as well.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

SIZES = {
    "released model": {"batch": 2, "queries": 16, "heads": 8, "channels": 64, "spatial_shapes": ((24, 24),) * 4},
    "one channel": {"channels": 1},
    "odd channels": {"channels": 37},
    "many channels": {"channels": 200},
    "one pixel": {"spatial_shapes": ((1, 1),)},
    "a row and a column": {"spatial_shapes": ((1, 7), (5, 1))},
    "batch not divisible by im2col_step": {"batch": 67, "queries": 2, "channels": 4},
    "no queries": {"queries": 0},
    "no batch": {"batch": 0},
    "no points": {"points": 0},
    "no channels": {"channels": 0},
}


def output_and_gradients(function, tensors, shapes):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(leaves[0], shapes, leaves[1], leaves[2])
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return output, torch.autograd.grad(output, leaves, grad_output.to(output))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_reference(msda, device, name, dtype):
    sizes = SIZES[name]
    shapes = sizes.get("spatial_shapes", ((4, 6), (3, 2)))
    tensors = random_inputs(**sizes, dtype=dtype, device=device)
    output, gradients = output_and_gradients(msda.ms_deform_attn, tensors, shapes)
    assert output.dtype == dtype
    assert all(gradient.dtype == dtype for gradient in gradients)
    if output.numel() == 0 or tensors[2].numel() == 0:
        assert not output.any()
        assert not any(gradient.any() for gradient in gradients)
        return
    exact, exact_gradients = output_and_gradients(
        ms_deform_attn_reference, [tensor.double() for tensor in tensors], shapes
    )
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        # Location gradients are multiplied by the level's side, so rounding counts relative to the largest entry.
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(gradient.double() / scale, expected / scale, rtol=tolerance, atol=tolerance)


def test_gradients_match_finite_differences(msda, device):
    shapes = ((3, 4), (2, 2))
    tensors = random_inputs(1, 3, 2, 3, shapes, 2, dtype=torch.float64, device=device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda v, l, w: msda.ms_deform_attn(v, shapes, l, w), leaves)


def test_only_the_requested_gradients_are_needed(msda, device):
    shapes = ((4, 6), (3, 2))
    value, locations, weights = random_inputs(device=device)
    weights.requires_grad_()
    msda.ms_deform_attn(value, shapes, locations, weights).sum().backward()
    assert weights.grad is not None


def test_non_contiguous_tensors(msda, device):
    shapes = ((4, 6), (3, 2))
    tensors = random_inputs(device=device)
    expected, expected_gradients = output_and_gradients(msda.ms_deform_attn, tensors, shapes)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    assert not any(tensor.is_contiguous() for tensor in strided)
    output = msda.ms_deform_attn(strided[0], shapes, strided[1], strided[2])
    assert torch.equal(output, expected)

    leaves = [tensor.requires_grad_() for tensor in strided]
    output = msda.ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
    expanded = torch.ones((), device=device).expand_as(output)  # what sum().backward() passes
    torch.testing.assert_close(
        torch.autograd.grad(output, leaves, expanded),
        torch.autograd.grad(msda.ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2]).sum(), leaves),
    )
    assert all(gradient.shape == tensor.shape for gradient, tensor in zip(expected_gradients, tensors, strict=True))


@pytest.mark.parametrize("location", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_a_location_that_is_nowhere_samples_nothing(msda, device, location):
    shapes = ((4, 6), (3, 2))
    value, locations, weights = random_inputs(device=device)
    locations[0, 0] = location
    output, gradients = output_and_gradients(msda.ms_deform_attn, (value, locations, weights), shapes)
    assert not output[0, 0].any()
    assert not gradients[1][0, 0].any()
    assert not gradients[2][0, 0].any()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_pixels_outside_a_level_are_not_read_even_when_neighbors_are_infinite(msda, device):
    """A zero weight must not meet the infinite value of another level: 0 * inf is not a number."""
    shapes = ((2, 2), (2, 2))
    value, locations, weights = random_inputs(1, 4, 1, 8, shapes, 1, device=device, margin=0.4)
    value[:, 4:] = float("inf")
    locations[:, :, :, 1] = 5.0
    output, gradients = output_and_gradients(msda.ms_deform_attn, (value, locations, weights), shapes)
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_an_infinite_pixel_reaches_only_the_samples_that_read_it(msda, device):
    """Corners are added up side by side, and those of a pixel are filled up with others that add nothing."""
    shapes = ((4, 6),)
    value, locations, weights = random_inputs(1, 5, 1, 8, shapes, 1, device=device, margin=0.0)
    locations[0, 0] = 0.5 / torch.tensor([6, 4], device=device)  # the first pixel's center; no other sample is near
    locations[0, 1:] = locations[0, 1:] / 2 + 0.5
    value[:, 0] = float("inf")
    output, gradients = output_and_gradients(msda.ms_deform_attn, (value, locations, weights), shapes)
    assert torch.isfinite(output[0, 1:]).all()
    assert torch.isfinite(gradients[0]).all()
    assert torch.isfinite(gradients[1][0, 1:]).all()
    assert torch.isfinite(gradients[2][0, 1:]).all()
    assert not torch.isfinite(gradients[2][0, 0]).any()


def test_mixed_dtypes_are_promoted(msda, device):
    shapes = ((4, 6), (3, 2))
    value, locations, weights = random_inputs(device=device)
    output = msda.ms_deform_attn(value.bfloat16(), shapes, locations, weights)
    assert output.dtype == torch.float32
    assert torch.equal(output, msda.ms_deform_attn(value.bfloat16().float(), shapes, locations, weights))


def broken_arguments():
    value, locations, weights = random_inputs()
    shapes = ((4, 6), (3, 2))
    yield "a level too few", (value, shapes[:1], locations, weights), ValueError, "height and a width for each"
    yield "levels that do not cover value", (value, ((4, 6), (3, 3)), locations, weights), ValueError, "positions"
    yield "a level without height", (value, ((4, 6), (0, 2)), locations, weights), ValueError, "impossible size"
    yield "a negative height", (value, ((-4, -6), (3, 2)), locations, weights), ValueError, "impossible size"
    yield "another batch", (value[:1], shapes, locations, weights), ValueError, "batch size"
    yield "another head count", (value[:, :, :2], shapes, locations, weights), ValueError, "number of heads"
    yield "weights of other queries", (value, shapes, locations, weights[:, :3]), ValueError, "attention_weights"
    yield (
        "locations with three coordinates",
        (value, shapes, locations.repeat(1, 1, 1, 1, 1, 2)[..., :3], weights),
        (ValueError),
        "sampling_locations",
    )
    yield "a flat value", (value.flatten(2), shapes, locations, weights), ValueError, "value must be"
    yield (
        "integers",
        (value.long(), shapes, locations.long(), weights.long()),
        (TypeError, NotImplementedError),
        "float32|not implemented",
    )
    yield "too many levels", (*many_levels(),), ValueError, "at most 32 levels"


def many_levels():
    shapes = ((1, 1),) * 33
    value, locations, weights = random_inputs(spatial_shapes=shapes)
    return value, shapes, locations, weights


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [case[1:] for case in broken_arguments()],
    ids=[c[0] for c in broken_arguments()],
)
def test_arguments_that_do_not_fit_are_refused(msda, device, arguments, error, message):
    arguments = [item.to(device) if isinstance(item, torch.Tensor) else item for item in arguments]
    with pytest.raises(error, match=message):
        msda.ms_deform_attn(*arguments)


@pytest.mark.parametrize("grad_shape", [(2, 5, 23), (2, 4, 24), (2, 120)])
def test_a_gradient_of_another_shape_is_refused(msda, device, grad_shape):
    value, locations, weights = random_inputs(device=device)
    backward = msda.deformable_attention.ops.ms_deform_attn_backward
    with pytest.raises(ValueError, match="grad_output must be"):
        backward(torch.zeros(grad_shape, device=device), value, [4, 6, 3, 2], locations, weights)


def test_a_backward_too_large_to_count_in_32_bits_is_refused(msda, device):
    if device != "cpu":
        pytest.skip("the limit is the CPU backward's; run where torch sees no GPU")
    queries = 2**26 + 1
    value, locations, weights = random_inputs(1, 1, 1, 1, ((1, 1),), 1)
    locations, weights = (tensor.expand(1, queries, *tensor.shape[2:]) for tensor in (locations, weights))
    with pytest.raises(ValueError, match="at most 67108864 positions"):
        msda.deformable_attention.ops.ms_deform_attn_backward(
            torch.zeros(()).expand(1, queries, 1), value, [1, 1], locations, weights
        )


def test_operator_registration(msda, device):
    shapes = [4, 6, 3, 2]
    tensors = [tensor.requires_grad_() for tensor in random_inputs(device=device)]
    ops = msda.deformable_attention.ops
    torch.library.opcheck(ops.ms_deform_attn_forward, (tensors[0], shapes, tensors[1], tensors[2]))
    grad_output = torch.randn(2, 5, 24, device=device)
    detached = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(
        ops.ms_deform_attn_backward,
        (grad_output, detached[0], shapes, detached[1], detached[2]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiled_graph_is_whole_and_is_reused(msda, device):
    shapes = ((4, 6), (3, 2))
    compiled = torch.compile(msda.ms_deform_attn, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        for batch in (2, 3, 5):
            tensors = random_inputs(batch=batch, queries=4 + batch, device=device)
            eager, eager_gradients = output_and_gradients(msda.ms_deform_attn, tensors, shapes)
            if batch == 5:
                torch._dynamo.config.error_on_recompile = True
            output, gradients = output_and_gradients(compiled, tensors, shapes)
            torch.testing.assert_close(output, eager)
            torch.testing.assert_close(gradients, eager_gradients)


def test_runs_are_repeatable(msda, device):
    """On the CPU each task owns what it writes, so the number of threads changes nothing, bit for bit."""
    if device != "cpu":
        pytest.skip("the CUDA backward adds with atomics, in any order")
    shapes = ((4, 6), (3, 2))
    tensors = random_inputs(batch=4, queries=40)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        output, gradients = output_and_gradients(msda.ms_deform_attn, tensors, shapes)
        results.append((output, *gradients))
    torch.set_num_threads(threads)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_cpu_build_uses_threads(msda, device):
    """torch's `parallel_for` is a header: compiled without OpenMP it runs on one thread and says nothing."""
    if device != "cpu":
        pytest.skip("threads are the CPU build's; run where torch sees no GPU")
    library = next(Path(msda.__file__).parent.glob("*.so"))
    assert any(symbol in library.read_bytes() for symbol in (b"GOMP_parallel", b"__kmpc_fork_call"))


def test_layer_is_pure_and_has_the_common_signature(msda, device):
    layer_class = msda.layers.MultiScaleDeformableAttention
    assert layer_class.__init__ is torch.nn.Module.__init__
    assert list(inspect.signature(layer_class.forward).parameters) == [
        "self",
        "value",
        "value_spatial_shapes",
        "value_spatial_shapes_list",
        "level_start_index",
        "sampling_locations",
        "attention_weights",
        "im2col_step",
    ]
    layer = copy.deepcopy(layer_class())
    shapes = [(4, 6), (3, 2)]
    value, locations, weights = random_inputs(device=device)
    shapes_tensor = torch.tensor(shapes, device=device)
    output = layer(value, shapes_tensor, shapes, torch.tensor([0, 24], device=device), locations, weights, 64)
    assert torch.equal(output, msda.ms_deform_attn(value, shapes, locations, weights))
