"""What clients send and get: OpenAI's images API, the Hub's `{"inputs": ...}`, and image tokens."""

import base64
import binascii
import io
import time
from typing import Annotated, Any, Literal

import PIL.Image
from pydantic import BaseModel, ConfigDict, Field

from vfmtok_hf.modeling.generation_vfmtok import SamplingSettings


ImageFormat = Literal["png", "jpeg", "webp"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

MAX_IMAGES = 10  # of a request, as OpenAI has it
# Larger pictures fill the memory before they are cropped.
MAX_PIXELS = 2**25


class Body(BaseModel):
    """A request's JSON. Unknown names are errors, as a misspelled setting would have no effect."""

    model_config = ConfigDict(extra="forbid")


class SamplingParameters(Body):
    """
    Settings of sampling, by the names that `generate` gives them; those that are not given are the checkpoint's.

    Args:
        seed (`int`, *optional*): image i is generated from `seed + i`. Drawn by the server if unset.
    """

    seed: Seed | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def settings(self, model: Any) -> SamplingSettings:
        """
        The settings for a generator.

        Raises:
            ValueError: one is out of range.
        """
        requested = {name: getattr(self, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
        return model.sampling_settings.resolve(requested, model.generation_config)


class ImagesRequest(SamplingParameters):
    """
    Body of `/v1/images/generations`: OpenAI's fields, as far as they mean something here, and settings of sampling.

    Args:
        prompt (`str`): a class, by name or number.
    """

    prompt: str
    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: ImageFormat = "png"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    quality: Literal["auto"] = "auto"
    user: str | None = None


class HubParameters(SamplingParameters):
    """The Hub's `parameters`."""

    num_images_per_label: int = Field(1, ge=1, le=MAX_IMAGES)


class HubRequest(Body):
    """
    Body of the Hub's inference: classes by name or number.
    """

    inputs: str | int | list[str | int]
    parameters: HubParameters = HubParameters()
    options: dict[str, Any] | None = None  # of the serverless API, such as `wait_for_model`


class TokensRequest(Body):
    """
    Body of `/v1/tokens`: base64 images to encode, or tokens to decode.
    """

    images: list[str] | None = Field(None, min_length=1, max_length=MAX_IMAGES)
    image_tokens: list[list[int]] | None = Field(None, min_length=1, max_length=MAX_IMAGES)
    output_format: ImageFormat = "png"


def encode_image(image: PIL.Image.Image, output_format: str) -> bytes:
    """The file of an image."""
    image.save(buffer := io.BytesIO(), output_format)
    return buffer.getvalue()


def to_base64(image: PIL.Image.Image, output_format: str) -> str:
    """The file of an image in base64."""
    return base64.b64encode(encode_image(image, output_format)).decode()


def from_base64(text: str) -> bytes:
    """
    The file of an image.

    Raises:
        ValueError: it is not base64, or the image is too large.
    """
    try:
        content = base64.b64decode(text.removeprefix("data:").rpartition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError(f"An image is not base64: {error}.") from error
    try:
        width, height = PIL.Image.open(io.BytesIO(content)).size
    except Exception as error:  # Pillow's readers raise nearly anything
        raise ValueError(f"An image cannot be read: {error}.") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"An image has {width} x {height} pixels, more than {MAX_PIXELS}: shrink it.")
    return content


class ImageReply:
    """
    The parts of OpenAI's answers.

    Args:
        request (`ImagesRequest`).
        image_size (`int`): side in pixels.
        num_image_tokens (`int`): of an image.
    """

    def __init__(self, request: ImagesRequest, image_size: int, num_image_tokens: int):
        self.num_tokens = request.n * num_image_tokens
        self.created = int(time.time())
        self.facts = {
            "background": "opaque",
            "output_format": request.output_format,
            "quality": "auto",
            "size": f"{image_size}x{image_size}",
        }

    @property
    def usage(self) -> dict[str, Any]:
        """A class counts as one token."""
        return {
            "input_tokens": 1,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 1},
            "output_tokens": self.num_tokens,
            "total_tokens": self.num_tokens + 1,
        }

    def whole(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer that is not streamed."""
        return {"created": self.created, "data": images, **self.facts, "usage": self.usage}

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event of a stream, `"partial_image"` or `"completed"`."""
        return {"type": f"image_generation.{kind}", "created_at": self.created, **self.facts, **fields}


__all__ = ["HubRequest", "ImageReply", "ImagesRequest", "SamplingParameters", "TokensRequest"]
