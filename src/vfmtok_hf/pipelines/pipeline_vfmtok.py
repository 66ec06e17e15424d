"""The diffusers pipeline: generate images from class labels, and encode and decode images."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Union

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import GenerationConfig
from transformers.image_utils import ImageInput

from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.modeling.image_reading_vfmtok import BLACK, each_image, read_image
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration

from .pipeline_base_vfmtok import (
    ClassLabels,
    Images,
    InputImages,
    VFMTokPipelineBase,
    VFMTokPipelineOutput,
    check_counts,
    check_generators,
)


ImageTokens = torch.Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]

# Names of this pipeline's arguments in other pipelines.
NAMES_HERE = {
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end, which is called after each token",
    "eta": "temperature",
    "num_images": "num_images_per_label",
    "num_images_per_prompt": "num_images_per_label",
    "prompt": "class_labels",
    "seed": "generator=torch.Generator().manual_seed(seed)",
}


def as_image_tokens(image_tokens: ImageTokens) -> torch.Tensor:
    """
    Convert image tokens of a batch or a single image to `(number of images, num_image_tokens)` int64.

    Raises:
        ValueError: the tokens are not integers, have unequal lengths, or are empty.
    """
    if not isinstance(image_tokens, torch.Tensor):
        try:
            image_tokens = np.asarray(list(image_tokens) if isinstance(image_tokens, Iterator) else image_tokens)
        except ValueError as error:  # numpy's message is about inhomogeneous parts
            raise ValueError("The images have unequal numbers of tokens.") from error
        if image_tokens.size and image_tokens.dtype.kind not in "iu":
            raise ValueError(f"Image tokens must be integers, got {image_tokens.dtype}.")
        image_tokens = torch.from_numpy(image_tokens.astype(np.int64))
    if image_tokens.is_floating_point() or image_tokens.dtype == torch.bool:
        raise ValueError(f"Image tokens must be integers, got {image_tokens.dtype}.")
    if not image_tokens.numel():
        raise ValueError("There are no image tokens: pass those of at least one image.")
    return torch.atleast_2d(image_tokens.long())


class VFMTokPipeline(VFMTokPipelineBase):
    r"""
    Class-conditional image generation with VFMTok, by default without classifier-free guidance.

    Args:
        vq_model ([`VFMTokModel`]): the image tokenizer.
        transformer ([`VFMTokARForImageGeneration`] or [`VFMTokRARForImageGeneration`], *optional*):
            The generator. `tokenize`, `detokenize` and `reconstruct` do not need it:
            `VFMTokPipeline.from_pretrained(path, transformer=None)`.
        image_processor ([`VFMTokImageProcessor`]): images to `pixel_values` and back.
        id2label (`dict[int, str]`, *optional*):
            Class names for a generator whose configuration has none; synonyms are separated by commas.

    Example:

    ```python
    >>> pipe = VFMTokPipeline.from_pretrained(vfmtok_hf.DEFAULT_CHECKPOINT)
    >>> image = pipe("smiley", generator=torch.Generator().manual_seed(0)).images[0]
    ```
    """

    vq_model: VFMTokModel
    transformer: VFMTokARForImageGeneration | VFMTokRARForImageGeneration | None
    image_processor: VFMTokImageProcessor

    model_cpu_offload_seq = "transformer->vq_model"
    _optional_components = ["transformer"]
    _callback_tensor_inputs = ["image_tokens"]
    _undecoded_output_type = "tokens"

    # diffusers 0.36 reads these annotations and does not support `X | Y`.
    def __init__(
        self,
        vq_model: VFMTokModel,
        transformer: Union[VFMTokARForImageGeneration, VFMTokRARForImageGeneration, None],  # noqa: UP007
        image_processor: VFMTokImageProcessor,
        id2label: Union[dict[int, str], dict[str, str], None] = None,  # noqa: UP007
    ):
        super().__init__()
        self.register_modules(vq_model=vq_model, transformer=transformer, image_processor=image_processor)
        if transformer is not None:
            self._generator_model()
        self._register_class_names(id2label)

    @property
    def autoencoder(self) -> VFMTokModel:
        """The image tokenizer."""
        return self.vq_model

    @classmethod
    def from_image_tokenizer(
        cls, pretrained_model_name_or_path, dtype: torch.dtype | str = torch.float32
    ) -> "VFMTokPipeline":
        """
        Create a pipeline without a generator.

        Args:
            pretrained_model_name_or_path (`str`): folder or repository of an image tokenizer.
            dtype (`torch.dtype`): precision of its weights.
        """
        vq_model = VFMTokModel.from_pretrained(pretrained_model_name_or_path, dtype=dtype)
        return cls(vq_model, None, VFMTokImageProcessor.from_pretrained(pretrained_model_name_or_path))

    # -- class labels -> images

    def _generator_model(self) -> VFMTokARForImageGeneration | VFMTokRARForImageGeneration:
        if self.transformer is None:
            raise ValueError("This pipeline has no generator: load it without transformer=None.")
        for of_vq_model, of_transformer in (("num_anchors", "num_image_tokens"), ("codebook_size", "codebook_size")):
            expected = getattr(self.vq_model.config, of_vq_model)
            actual = getattr(self.transformer.config, of_transformer)
            if expected != actual:
                raise ValueError(
                    f"The generator belongs to another image tokenizer: its {of_transformer} is {actual}, but the "
                    f"tokenizer's {of_vq_model} is {expected}."
                )
        return self.transformer

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels,
        num_images_per_label: int = 1,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VFMTokPipeline", int, int, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image_tokens",),
        decode_batch_size: int = 16,
        **generate_kwargs,
    ) -> VFMTokPipelineOutput | tuple:
        """
        Generate images.

        Args:
            class_labels (`int`, `str` or a list of them):
                Class ids or names; a name is any synonym in `id2label`, case-insensitive.
            num_images_per_label (`int`, defaults to 1):
                Images of the same label are consecutive.
            generation_config (`GenerationConfig`, *optional*):
                Sampling options that replace those in the generator's own `generation_config`.
            generator (`torch.Generator` or a list of one per image, *optional*):
                Random generators. With a list, an image depends only on its own generator: in float32, the same seed gives the
                same tokens in any batch, and pixels that differ at most by rounding. In half precision, tokens can differ.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (floats in [0, 1], channels last), `"pt"` (the same, channels first), `"uint8"` (8-bit tensors,
                channels first), or `"tokens"` for the image tokens `(batch_size, num_image_tokens)` themselves.
            return_dict (`bool`, defaults to `True`): `False` returns `(images,)`.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, step, {"image_tokens": tokens})` after each token; the third argument replaces
                diffusers' timestep. To replace the tokens sampled so far, return a dictionary with `image_tokens`; the
                generator has already read all except the newest. To stop, set `pipe._interrupt = True`; tokens that are
                not sampled yet are 0.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["image_tokens"]`):
                Entries of the callback's dictionary: `image_tokens` or none.
            decode_batch_size (`int`, defaults to 16): images that are decoded at once, which limits memory.
            generate_kwargs:
                Further arguments of the generator's `generate`, such as sampling options, which override both
                configurations: `guidance_scale`, `guidance_interval`, `temperature`, `top_k`, `top_p`, `do_sample`; for
                RAR generators also `guidance_scale_pow` and `orders`. The defaults are no guidance and no filters.

        Returns:
            `VFMTokPipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: unknown labels or output type, a number of images below 1, or invalid options of the generator.
            TypeError: unknown arguments, or arguments of the wrong type.
        """
        self._check_output_type(output_type)
        check_counts(num_images_per_label=num_images_per_label, decode_batch_size=decode_batch_size)
        class_ids = [class_id for class_id in self.get_label_ids(class_labels) for _ in range(num_images_per_label)]
        check_generators(generator, len(class_ids))
        image_tokens = self._sample(
            class_ids,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            generation_config=generation_config,
            generator=generator,
            **generate_kwargs,
        )
        return self._output(image_tokens, output_type, return_dict, decode_batch_size)

    def _sample(
        self,
        class_ids: list[int],
        callback_on_step_end: Callable | None,
        tensor_inputs: Sequence[str],
        **generate_kwargs,
    ) -> torch.Tensor:
        transformer = self._generator_model()
        if foreign := sorted(generate_kwargs.keys() & NAMES_HERE.keys()):
            raise TypeError(f"There is no argument {foreign[0]!r}: pass {NAMES_HERE[foreign[0]]} instead.")
        self._check_callback_inputs(tensor_inputs)
        self._interrupt = False
        with self.progress_bar(total=transformer.config.num_image_tokens) as progress_bar:

            def callback(step: int, image_tokens: torch.Tensor) -> bool | torch.Tensor | None:
                progress_bar.update(step + 1 - progress_bar.n)  # kept tokens of an edited image are not sampled
                returned = None
                if callback_on_step_end is not None:
                    tensors = {"image_tokens": image_tokens} if tensor_inputs else {}
                    returned = callback_on_step_end(self, step, step, tensors)
                if self._interrupt:
                    return False
                return self._check_callback_result(returned).get("image_tokens")

            labels = torch.tensor(class_ids).to(self._execution_device)
            return transformer.generate(labels, callback=callback, **generate_kwargs)

    # -- images <-> image tokens

    @torch.no_grad()
    def tokenize(self, images: InputImages, batch_size: int = 16) -> torch.Tensor:
        """
        Image tokens `(number of images, num_image_tokens)` of images.

        Args:
            images: an image that [`~vfmtok_hf.modeling.image_reading_vfmtok.read_image`] reads, a batch as an array or
                tensor, or a list, generator or data set column of images.
            batch_size (`int`, defaults to 16): images that are read and encoded at once, which limits memory.

        Raises:
            ValueError, TypeError, FileNotFoundError: images are missing or invalid, or the checkpoint has no vision weights.
        """
        return torch.cat([encoded.image_tokens for encoded in self._encoded_batches(images, batch_size)])

    @torch.no_grad()
    def detokenize(
        self,
        image_tokens: ImageTokens,
        output_type: str = "pil",
        size: int | None = None,
        resize_mode: str = "generation",
        batch_size: int = 16,
    ) -> Images:
        """
        Decode image tokens to images.

        Args:
            image_tokens (`torch.Tensor`, `np.ndarray` or list of shape `(number of images, num_image_tokens)`):
                Integers in [0, codebook_size). A single sequence is a batch of one.
            output_type, size, resize_mode: as in [`VFMTokImageProcessor.postprocess`].
            batch_size (`int`, defaults to 16): images that are decoded at once, which limits memory.

        Raises:
            ValueError: tokens are missing, not integers, or belong to another model.
        """
        tokens = as_image_tokens(image_tokens)
        return self._decoded_images("image_tokens", tokens, batch_size, output_type, size, resize_mode)

    def _encode(self, images: InputImages, batch_size: int) -> torch.Tensor:
        return self.tokenize(images, batch_size)

    def _decode(self, undecoded: torch.Tensor, output_type: str, batch_size: int) -> Images:
        return self.detokenize(undecoded, output_type, batch_size=batch_size)

    # -- editing by tokens

    @torch.no_grad()
    def inpaint(
        self,
        images: InputImages,
        class_labels: ClassLabels,
        mask: ImageInput | torch.Tensor,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VFMTokPipeline", int, int, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image_tokens",),
        decode_batch_size: int = 16,
        **generate_kwargs,
    ) -> VFMTokPipelineOutput | tuple:
        """
        Repaint a part of images for a class, and keep the tokens of the rest.

        This needs a generator that samples tokens in any order (RAR), so every new token attends to all kept ones. An image
        token also encodes the surroundings of its cell, so kept parts change a little.

        Args:
            images: one image or a list of them.
            class_labels: one label for all images, or one per image.
            mask:
                An image that is white where to repaint. A token is repainted if more than half of its cell is white. It is
                cropped like the images, so it needs their aspect ratio; a square one belongs to what the crop keeps.
                Transparent pixels are not marked. It has at least as many pixels as there are tokens. Or a bool tensor
                `(num_image_tokens,)` that is True where to repaint. One for all images.
            generation_config, generator, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, decode_batch_size, generate_kwargs: as in `__call__`.

        Raises:
            ValueError: the generator supports only raster order, the mask is empty or does not fit the images, or labels,
                generators and images do not match.
            TypeError: arguments of the wrong type.
        """
        self._check_output_type(output_type)
        check_counts(decode_batch_size=decode_batch_size)
        if "keep_mask" not in inspect.signature(self._generator_model().generate).parameters:
            raise ValueError(
                f"{type(self.transformer).__name__} samples tokens only in raster order and cannot keep later ones: "
                "load a pipeline with a RAR generator."
            )
        class_ids = self.get_label_ids(class_labels)
        mask = self._read_mask(mask)
        redraw = self.token_mask(mask)
        if not redraw.any():
            raise ValueError("The mask marks no token: make more than half of at least one token's cell white.")
        images = list(each_image(images))
        if len(class_ids) not in (1, len(images)):
            raise ValueError(
                f"Got {len(class_ids)} class labels for {len(images)} images: pass one, or one per image."
            )
        check_generators(generator, len(images))
        if isinstance(mask, PIL.Image.Image):
            images = (image_fitting(mask, image) for image in images)  # files are read in their batch
        image_tokens = self.tokenize(images, decode_batch_size)
        edited_tokens = self._sample(
            class_ids * (len(image_tokens) // len(class_ids)),
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            image_tokens=image_tokens.to(self._execution_device),
            keep_mask=~redraw.to(self._execution_device),
            generation_config=generation_config,
            generator=generator,
            **generate_kwargs,
        )
        return self._output(edited_tokens, output_type, return_dict, decode_batch_size)

    def token_mask(self, mask: ImageInput | torch.Tensor) -> torch.Tensor:
        """
        `(num_image_tokens,)`, True for tokens with more than half of their cell white in the image `mask`.

        Raises:
            ValueError, TypeError, FileNotFoundError: the mask is not an image, has fewer pixels than tokens, or is a tensor
                per token that is not bool or has another length.
        """
        mask = self._read_mask(mask)
        if isinstance(mask, torch.Tensor):
            return mask
        pixels = self.image_processor(mask, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        white = (pixels.float().mean(dim=1) > 127.5).float()
        share = F.adaptive_avg_pool2d(white, self.vq_model.config.anchor_grid_size)
        return share.flatten() > 0.5

    def _read_mask(self, mask: ImageInput | torch.Tensor) -> torch.Tensor | PIL.Image.Image:
        """A bool mask of tokens as a tensor, any other mask as an image. Raises the errors of `token_mask`."""
        num_tokens, side = self.vq_model.config.num_anchors, self.vq_model.config.anchor_grid_size
        if getattr(mask, "ndim", None) == 1:
            tokens = torch.as_tensor(mask)
            if tokens.dtype != torch.bool or len(tokens) != num_tokens:
                raise ValueError(
                    f"A mask of tokens must be bool of shape ({num_tokens},), got {tokens.dtype} of shape ({len(tokens)},)."
                )
            return tokens
        masks = list(each_image(mask))
        if len(masks) != 1:
            raise ValueError(
                f"Got {len(masks)} masks: pass one for all images, an image or a bool tensor of shape ({num_tokens},)."
            )
        try:
            picture = read_image(masks[0], background=BLACK)
        except (TypeError, ValueError) as error:
            raise type(error)(f"The mask cannot be used: {error}") from error
        if min(picture.size) < side:
            raise ValueError(
                f"The mask has {picture.width} x {picture.height} pixels, fewer than the {side} x {side} tokens. A mask of "
                f"tokens has shape ({num_tokens},) and is for all images."
            )
        return picture


def image_fitting(mask: PIL.Image.Image, image: ImageInput) -> PIL.Image.Image:
    """
    Read an image to which a mask belongs.

    Raises:
        ValueError: their aspect ratios differ, so the crop would move the mask, which is not square either.
    """
    picture = read_image(image)
    # One may have been resized for the other, to whole pixels, so the smaller one's ratio can be off by one of them.
    off = abs(mask.width * picture.height - mask.height * picture.width)
    if mask.width != mask.height and off > max(*picture.size, *mask.size):
        raise ValueError(
            f"The mask has {mask.width} x {mask.height} pixels and its image {picture.width} x {picture.height}, so the crop "
            "would move it: give the mask the aspect ratio of the image, or make a square one for the cropped image."
        )
    return picture


__all__ = ["VFMTokPipeline"]
