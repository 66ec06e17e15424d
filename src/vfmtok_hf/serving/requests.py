"""Bodies of requests and replies: OpenAI's images API, the Hub's `{"inputs": ...}`, and image tokens."""

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
Name = Annotated[str, Field(max_length=1000)]  # errors repeat it

MAX_IMAGES = 10  # per request, the limit of OpenAI's API
# Others run programs (EPS) or are rare. Pillow's names.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Larger images would fill the memory before they are cropped.
MAX_PIXELS = 2**25


class Body(BaseModel):
    """JSON body of a request. Unknown fields are errors, because a misspelled setting would have no effect."""

    model_config = ConfigDict(extra="forbid")


class SamplingParameters(Body):
    """
    Sampling settings, with the names of `generate`'s arguments. Unset ones default to the checkpoint's.

    Args:
        seed (`int`, *optional*): image i uses `seed + i`. The server draws a seed if it is unset.
    """

    seed: Seed | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def settings(self, model: Any) -> SamplingSettings:
        """
        The settings for the generator `model`.

        Raises:
            ValueError: a setting is out of range.
        """
        requested = {name: getattr(self, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
        return model.sampling_settings.resolve(requested, model.generation_config)


class ImagesRequest(SamplingParameters):
    """
    Body of `/v1/images/generations`: fields of OpenAI's API, and sampling settings.

    Args:
        prompt (`str`): name or number of a class.
    """

    prompt: Name
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
    """Body of the Hub's inference API. `inputs` are names or numbers of classes."""

    inputs: Name | int | Annotated[list[Name | int], Field(max_length=MAX_IMAGES)]
    parameters: HubParameters = HubParameters()


class TokensRequest(Body):
    """Body of `/v1/tokens`: base64 images to encode, or tokens to decode."""

    images: list[str] | None = Field(None, min_length=1, max_length=MAX_IMAGES)
    image_tokens: list[list[int]] | None = Field(None, min_length=1, max_length=MAX_IMAGES)
    output_format: ImageFormat = "png"


def encode_image(image: PIL.Image.Image, output_format: str) -> bytes:
    """Encode an image to a file's bytes."""
    image.save(buffer := io.BytesIO(), output_format)
    return buffer.getvalue()


def to_base64(image: PIL.Image.Image, output_format: str) -> str:
    """Encode an image to a base64 file."""
    return base64.b64encode(encode_image(image, output_format)).decode()


def from_base64(text: str) -> bytes:
    """
    Decode a base64 image file to its bytes.

    Raises:
        ValueError: the text is not base64, or the image is unreadable or too large.
    """
    try:
        content = base64.b64decode(text.removeprefix("data:").rpartition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError(f"An image is not base64: {error}.") from error
    try:
        width, height = PIL.Image.open(io.BytesIO(content), formats=FORMATS).size
    except Exception as error:  # Pillow's readers raise nearly anything
        raise ValueError(f"An image cannot be read: {error}.") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"An image has {width} x {height} pixels, more than {MAX_PIXELS}: shrink it.")
    return content


class ImageReply:
    """
    Replies in the format of OpenAI's images API.

    Args:
        request (`ImagesRequest`): the request.
        image_size (`int`): image height and width in pixels.
        num_image_tokens (`int`): tokens per image.
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
        """Number of tokens. A class counts as one."""
        return {
            "input_tokens": 1,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 1},
            "output_tokens": self.num_tokens,
            "total_tokens": self.num_tokens + 1,
        }

    def whole(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        """The reply with all `images`, without streaming."""
        return {"created": self.created, "data": images, **self.facts, "usage": self.usage}

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """A stream event of type `kind`, `"partial_image"` or `"completed"`, with additional `fields`."""
        return {"type": f"image_generation.{kind}", "created_at": self.created, **self.facts, **fields}


__all__ = ["HubRequest", "ImageReply", "ImagesRequest", "SamplingParameters", "TokensRequest"]
