"""
The trainers learn: real images by heart, through the whole chain from pixels to greedy samples.

With a learning rate of 0 the tokenizer ends below 8 dB and the generators at ln 64 = 4.16 nats a token.
"""

import shutil
from pathlib import Path

import pytest
import torch

from tests.testing import sequences_of
from tests.training.tiny_runs import DROPOUTS, generator_options, log_of, run, tokenizer_options, write_vision_model
from vfmtok_hf import VFMTokPipeline
from vfmtok_hf.data.token_sets import TokenSet
from vfmtok_hf.training import train_generator, train_tokenizer


PICTURES = Path(__file__).parents[2] / "examples" / "images"
NAMES = ("car", "cat", "clock", "flag", "fruit", "hand", "heart", "moon")
PLAIN = {"crop_scale": [1.0, 1.0], "horizontal_flip": False, "batch_size": len(NAMES), "schedule": "cosine"}
RARELY = {"log_every": 50, "validate_every": 1000, "checkpoint_every": 1000}
MODEL = {
    "hidden_size": 64,
    "encoder_intermediate_size": 128,
    "decoder_intermediate_size": 128,
    "decoder_dropout": 0.0,
    "num_anchors": 16,
    "codebook_dim": 8,
    "pixel_decoder_base_channels": 16,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight emoji, each of a class of its own, seen at 32 x 32."""
    root = tmp_path_factory.mktemp("images")
    for name in NAMES:
        (root / name).mkdir()
        shutil.copy(PICTURES / f"{name}.png", root / name)
    return root


@pytest.fixture(scope="module")
def tokenizer(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    options = {
        "model": MODEL,
        "max_steps": 260,
        "warmup_steps": 20,
        "learning_rate": 2e-3,
        "ema_decay": 0.98,
        "l1_weight": 1.0,
        "perceptual_weight": 0.0,
        "model.feature_loss_weight": 0.1,
        "adversarial_weight": 0.0,
        "codebook_warmup_steps": 50,
        "kmeans_images": len(NAMES),
        "restart_patience": 50,
    }
    argv = tokenizer_options(images, write_vision_model(root / "vision"), root / "run", **PLAIN, **RARELY, **options)
    run(lambda: train_tokenizer.main(argv))
    return root / "run"


def test_a_tokenizer_learns_real_images_by_heart(tokenizer):
    """Through 16 tokens of a codebook of 64, by the averaged weights."""
    assert log_of(tokenizer, "validation")[-1]["psnr"] > 25


@pytest.mark.parametrize("generator", ["ar", "rar"])
def test_a_generator_learns_their_tokens_by_heart(generator, tokenizer, images, tmp_path):
    options = {
        "generator": generator,
        "model.hidden_size": 64,
        "model.intermediate_size": 128,
        **{f"model.{name}": 0.0 for name in DROPOUTS[generator]},
        "num_crops": 1,
        "max_steps": 150,
        "learning_rate": 5e-3,
        "weight_decay": 0.0,
        "sample_every": 1000,
    }
    argv = generator_options(images, tokenizer / "model", tmp_path / "run", **PLAIN, **RARELY, **options)
    run(lambda: train_generator.main(argv))
    shards = TokenSet(tmp_path / "run" / "tokens" / "train")
    tokens = torch.cat([sequences_of(shards, index) for index in range(len(shards))])
    assert len(tokens.unique(dim=0)) == len(NAMES)
    pipe = VFMTokPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.id2label == dict(enumerate(NAMES))
    labels = torch.tensor(shards.labels)
    # Not the loss of validation, whose central crops are resized as for `tokenize`: a few tokens differ from these.
    with torch.no_grad():
        loss = pipe.transformer(class_labels=labels, image_tokens=tokens, return_loss=True).loss
    assert loss < 0.02  # nats a token
    drawn = pipe.transformer.generate(labels, do_sample=False)
    assert torch.equal(drawn, tokens)
