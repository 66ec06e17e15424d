"""
The diffusion transformer against numbers that the original code computed, from the converted original checkpoint.

Bounds are those of the reference's README: 2e-5 for a forward pass and its stages; gradient norms within 1e-4.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.testing import REFERENCE, reference_tensors
from vfmtok_hf import VFMTokDiTForImageGeneration
from vfmtok_hf.conversion import convert_dit, export_original_dit
from vfmtok_hf.cpu.packing import pack_weights
from vfmtok_hf.modeling.modeling_vfmtok_dit import position_table
from vfmtok_hf.modeling.rotary_vfmtok import rotary_table


FOLDER = REFERENCE / "ditdh"
# Of the original's list of blocks the first three are the encoder's.
BLOCKS = {0: "encoder_layers.0", 1: "encoder_layers.1", 2: "encoder_layers.2", 3: "head_layers.0", 4: "head_layers.1"}


@pytest.fixture(scope="module")
def tensors():
    return reference_tensors("ditdh")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("dit")
    for name, file, weights in (
        ("ema", "ditdh.pt", "ema"),
        ("model", "ditdh.pt", "model"),
        ("guidance", "ditdh_guidance.pt", "ema"),
    ):
        convert_dit(FOLDER / file, root / name, weights=weights)
    return root


def load(folder):
    return VFMTokDiTForImageGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=[nn.Identity(), pack_weights], ids=["plain", "packed"])
def model(request, folders):
    return request.param(load(folders / "ema"))


def forward(model, tensors):
    with torch.no_grad():
        return model(tensors["forward.x"], tensors["forward.t"], tensors["forward.labels"]).velocity


def close(actual, expected, bound=2e-5):
    torch.testing.assert_close(actual.to(expected.dtype), expected, atol=bound, rtol=0)


def test_stages(model, tensors):
    seen, inputs = {}, {}

    def record(name):
        def hook(module, args, output):
            seen[name], inputs[name] = output, args[0]

        return hook

    names = ["time_embedding", "class_embedding", "encoder_embed", "head_embed", "condition_proj", "velocity_proj"]
    names += BLOCKS.values()
    names += [f"{block}.{part}" for block in BLOCKS.values() for part in ("modulation", "self_attn", "mlp")]
    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    velocity = forward(model, tensors)
    for handle in handles:
        handle.remove()

    close(seen["time_embedding"], tensors["forward.time_embedding"])
    close(seen["class_embedding"], tensors["forward.class_embedding"])
    close(seen["encoder_embed"].flatten(2).transpose(1, 2), tensors["forward.encoder_patches"])
    close(seen["head_embed"].flatten(2).transpose(1, 2), tensors["forward.head_patches"])
    close(inputs["condition_proj"], tensors["forward.conditioning.input"])
    close(seen["condition_proj"], tensors["forward.conditioning"])
    for number in (0, 3):
        block, key = BLOCKS[number], f"forward.block{number}"
        close(inputs[block], tensors[f"{key}.input"])
        close(seen[f"{block}.modulation"], tensors[f"{key}.modulation"])
        close(seen[f"{block}.self_attn"], tensors[f"{key}.attention"])
        close(seen[f"{block}.mlp"], tensors[f"{key}.mlp"])
    for number, block in BLOCKS.items():
        close(seen[block], tensors[f"forward.block{number}.output"])
    close(seen["velocity_proj"], tensors["forward.final_layer"])
    close(velocity, tensors["forward.output"])


def test_attention_implementations_agree(folders, tensors):
    model = load(folders / "ema")
    model.set_attn_implementation("eager")
    close(forward(model, tensors), tensors["forward.output"])


def test_other_weights(folders, tensors):
    close(forward(load(folders / "model"), tensors), tensors["model_weights.forward.output"])
    close(forward(load(folders / "guidance"), tensors), tensors["guidance_weights.forward.output"])


def test_float64_run(folders, tensors):
    """All but the time embedding, whose features are float32, in float64."""
    model = VFMTokDiTForImageGeneration.from_pretrained(folders / "ema", dtype=torch.float64).eval()
    close(forward(model.double(), tensors), tensors["f64.forward.output"], 2e-6)


def test_tables(model, tensors):
    config = model.config
    close(
        position_table(config.sample_size, config.hidden_size, config.rope_theta), tensors["pos_embed.formula"], 1e-7
    )
    # The averaged weights hold another one: it is loaded, not computed.
    assert (model.position_embeddings - tensors["pos_embed.formula"]).abs().max() > 1e-3
    widths = {"encoder": config.hidden_size, "head": config.head_hidden_size}
    for part, width in widths.items():
        cosines, sines = rotary_table(1 + torch.arange(16), 4, width // 2, config.rope_theta)
        close(cosines, tensors[f"rope.{part}_cos"], 1e-6)
        close(sines * torch.tensor([-1, 1]).repeat(width // 4), tensors[f"rope.{part}_sin"], 1e-6)


def test_training_loss_and_gradients(folders, tensors):
    model = load(folders / "model").train()
    model.config.class_dropout = 0.0
    t, data, noise = tensors["train.t"], tensors["train.data"], tensors["train.noise"]
    shifted = 0.999 * tensors["train.uniform"]
    close(4 * shifted / (1 + 3 * shifted), t, 1e-6)
    noisy = (1 - t[:, None, None, None]) * data + t[:, None, None, None] * noise
    close(noisy, tensors["train.x_t"], 1e-6)
    close(noise - data, tensors["train.target"], 1e-6)
    velocity = model(noisy, t, tensors["train.labels_after_drop"]).velocity
    close(velocity, tensors["train.prediction"])
    per_image = F.mse_loss(velocity, noise - data, reduction="none").mean((1, 2, 3))
    close(per_image, tensors["train.loss_per_image"])
    loss = per_image.mean()
    close(loss, tensors["train.loss"].squeeze())

    loss.backward()
    gradients = VFMTokDiTForImageGeneration(model.config)
    for target, source in zip(gradients.parameters(), model.parameters(), strict=True):
        target.data = source.grad
    original = export_original_dit(gradients)
    expected = json.loads((FOLDER / "train_grad_norms.json").read_text())
    largest = max(expected.values())
    compared = {name: norm for name, norm in expected.items() if norm > 1e-5 * largest}
    assert len(compared) > 50
    for name, norm in compared.items():
        assert original[name].double().norm().item() == pytest.approx(norm, rel=1e-4), name
