"""
What users call works on a device without float64, such as Apple's MPS, and gives what the CPU gives. Models alone:
`modeling/test_devices.py`.
"""

from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from tests.limited_device import limited_device
from tests.modeling.generators import tiny_ar, tiny_rar
from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.testing import tiny_images, tiny_model
from vfmtok_hf.data.token_sets import encode_sequences
from vfmtok_hf.evaluation.linear_probe import LabeledImages, representations_of
from vfmtok_hf.evaluation.reconstruction import evaluate_reconstruction
from vfmtok_hf.evaluation.tokens import anchor_attention, evaluate_tokens
from vfmtok_hf.training import generator_training, tokenizer_training
from vfmtok_hf.training.codebook import CodebookUsage, initialize_codebook
from vfmtok_hf.training.discriminator import DiscriminatorObjective, PatchDiscriminator, adversarial_loss
from vfmtok_hf.training.objective import TokenizerObjective


# Tensors of the pretended device cannot become lists.
ONE_PROCESS = SimpleNamespace(num_processes=1, process_index=0, gather=torch.Tensor.cpu, reduce=torch.Tensor.cpu)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


PIPELINE_CALLS = {
    "tokenize": lambda pipe, images: pipe.tokenize(images),
    "reconstruct": lambda pipe, images: pipe.reconstruct(images, "pt").images,
    "generate": lambda pipe, images: pipe([0, 3], generator=seeded(), output_type="pt").images,
    "guide": lambda pipe, images: (
        pipe([0, 3], generator=seeded(), output_type="pt", guidance_scale=2.0, guidance_interval=2, top_p=0.8).images
    ),
    "inpaint": lambda pipe, images: (
        pipe.inpaint(images, [0, 3], torch.arange(9) < 4, generator=seeded(), output_type="pt").images
    ),
    "inpaint by a picture": lambda pipe, images: (
        pipe.inpaint(images, 1, to_pil_image(torch.ones(3, 32, 32)), generator=seeded(), output_type="pt").images
    ),
}


@pytest.mark.parametrize("call", PIPELINE_CALLS)
def test_pipeline(call):
    pipe, images = tiny_pipeline("rar"), list(tiny_images(size=40) / 2 + 0.5)
    expected = PIPELINE_CALLS[call](pipe, images)
    with limited_device(pipe.vq_model, pipe.transformer) as device:
        assert pipe.device == device
        result = PIPELINE_CALLS[call](pipe, images).cpu()
    # A pixel may be rounded to the next of 256 levels; tokens are integers, which such a tolerance holds equal.
    torch.testing.assert_close(result, expected, rtol=0, atol=1.01 / 255)


def test_pictures():
    pipe = tiny_pipeline()
    with limited_device(pipe.vq_model, pipe.transformer):
        assert [image.size for image in pipe([0, 3]).images] == [(32, 32)] * 2


def test_evaluation():
    pipe = tiny_pipeline()
    pictures = [to_pil_image(image) for image in tiny_images(size=40) / 2 + 0.5]
    labeled = LabeledImages(pictures, [0, 1], ["first", "second"], "pictures")

    def evaluate():
        reconstruction = evaluate_reconstruction(pipe, pictures)
        tokens = evaluate_tokens(pipe, pictures)
        attention = anchor_attention(pipe, pictures)
        representations = representations_of(pipe.vq_model, labeled, batch_size=2)
        return (
            *(torch.tensor(value) for value in reconstruction.values.values()),
            *(tokens.token_counts, tokens.position_entropy, *vars(tokens.anchors).values()),
            *(attention.sampling_locations, attention.attention_weights, *representations.values()),
        )

    expected = evaluate()
    with limited_device(pipe.vq_model):
        # A pixel may be rounded to the other of two levels.
        torch.testing.assert_close(evaluate(), expected, rtol=1e-3, atol=1e-4)


def test_validation_of_tokenizers():
    model, images = tiny_model(), [{"pixel_values": image} for image in tiny_images(4)]
    arguments = SimpleNamespace(batch_size=2, num_workers=0, grid_images=2)
    expected, _ = tokenizer_training.validate(model, images, True, arguments, ONE_PROCESS)
    with limited_device(model):
        metrics, pictures = tokenizer_training.validate(model, images, True, arguments, ONE_PROCESS)
        assert pictures[0][0].device == model.device
    assert metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("make_model", [tiny_ar, tiny_rar])
def test_validation_of_generators(make_model):
    model = make_model()
    data = [{"label": label, "image_tokens": torch.arange(9) + label} for label in range(3)]
    expected = generator_training.validate(model, data, 2, ONE_PROCESS)
    with limited_device(model):
        assert generator_training.validate(model, data, 2, ONE_PROCESS) == pytest.approx(expected, rel=1e-5)


def test_training_losses():
    weights = {"l1": 1.0, "mse": 1.0, "lpips": 0.0, "perceptual": 1.0}
    objective = TokenizerObjective(tiny_model(decoder_dropout=0.0, entropy_loss_weight=0.1), weights)
    judge, images = PatchDiscriminator(8, num_groups=2), tiny_images()

    def losses(images):
        out = objective(images)
        usage = CodebookUsage(64, images.device)
        usage.update(out["image_tokens"])
        verdict = DiscriminatorObjective(judge)(out["reconstruction"], images)["discriminator"]
        return out["loss"], adversarial_loss(judge(out["reconstruction"])), verdict, torch.tensor(usage.usage())

    with torch.no_grad():
        expected = losses(images)
    with limited_device(objective, judge) as device:
        torch.testing.assert_close([loss.cpu() for loss in losses(images.to(device))], list(expected))


def test_tokens_and_codebook_of_a_data_set():
    model, images = tiny_model(), tiny_images(16)
    expected = encode_sequences(model, images, codebook_top_k=2)
    with limited_device(model) as device:
        assert torch.equal(encode_sequences(model, images.to(device), codebook_top_k=2).cpu(), expected)
        initialize_codebook(model, [images], seed=0)
        assert model.quantizer.codebook.weight.cpu().norm(dim=1).allclose(torch.ones(64))
