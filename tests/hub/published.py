"""A tokenizer, both generators, pipelines and a light tokenizer on the fake Hub, and what they compute."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.pipelines.tiny_pipeline import tiny_generator, tiny_pipeline
from tests.testing import tiny_images, tiny_model

from .fake_hub import FakeHub


def publish(hub: FakeHub, folder: Path) -> None:
    """Repositories of `tester`, their folders, and `folder / "expected"` with inputs and outputs."""
    torch.manual_seed(0)
    pipeline, ar = tiny_pipeline("rar"), tiny_generator("ar")
    tokenizer, rar = pipeline.vq_model, pipeline.transformer
    images, labels = tiny_images(), torch.tensor([0, 3])
    tokens = tokenizer.encode(images).image_tokens
    drawn = pipeline([0, 3], generator=torch.Generator().manual_seed(0), output_type="tokens").images
    picture = np.random.default_rng(0).integers(256, size=(40, 50, 4), dtype=np.uint8)  # partly transparent
    pixel_values = pipeline.image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    expected = {
        "images": images,
        "labels": labels,
        "tokens": tokens,
        "reconstruction": tokenizer.decode(image_tokens=tokens).reconstruction,
        "ar": ar(class_labels=labels, image_tokens=tokens).logits,
        "rar": rar(class_labels=labels, image_tokens=tokens).logits,
        "drawn": drawn,
        "pictures drawn": pipeline.detokenize(drawn, "pt"),
        "picture": torch.from_numpy(picture),
        "pixel_values": pixel_values,
        "picture tokens": tokenizer.encode(pixel_values).image_tokens,
    }
    save_file({name: tensor.detach().contiguous() for name, tensor in expected.items()}, folder / "expected")

    for name, model in {"tokenizer": tokenizer, "ar": ar, "rar": rar, "vision": tokenizer.vision_model}.items():
        model.save_pretrained(folder / name)
    pipeline.image_processor.save_pretrained(folder / "tokenizer")
    pipeline.save_pretrained(folder / "pipe", max_shard_size="50KB")
    pipeline.save_pretrained(folder / "pipe", variant="fp16")
    for name in ("tokenizer", "ar", "rar", "pipe", "vision"):
        hub.put(name, folder / name)

    revision = hub.repositories["tester/vision"].head.oid
    light = tiny_model(
        save_vision_model=False, vision_model_name_or_path="tester/vision", vision_model_revision=revision
    )
    light.load_state_dict({k: v for k, v in tokenizer.state_dict().items() if not k.startswith("vision_model.")})
    light.save_pretrained(folder / "light")
    pipeline.image_processor.save_pretrained(folder / "light")
    hub.put("light", folder / "light")
