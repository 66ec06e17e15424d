"""The diffusers pipeline of VFMTok2: class labels to images by diffusion on VFMAE's latents, images to latents and back."""

from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.modeling.modeling_vfmae import VFMAEModel
from vfmtok_hf.modeling.modeling_vfmtok_dit import VFMTokDiTForImageGeneration

from .pipeline_base_vfmtok import (
    ClassLabels,
    Images,
    InputImages,
    VFMTokPipelineBase,
    VFMTokPipelineOutput,
    check_counts,
    check_generators,
)


# The last time of the original's sampler, before the scheduler's shift. Sampling does not continue to 0.
LAST_TIME = 0.001


def released_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of the released diffusion transformers: their times are shifted by 4."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=4.0)


class VFMTokDiTPipeline(VFMTokPipelineBase):
    r"""
    Class-conditional image generation with VFMTok2, by default without guidance.

    Args:
        vae ([`VFMAEModel`]): the autoencoder, with the statistics of its latents.
        transformer ([`VFMTokDiTForImageGeneration`], *optional*):
            The denoiser. `encode`, `decode` and `reconstruct` do not need it.
        scheduler (`FlowMatchEulerDiscreteScheduler`):
            The released denoisers want a `shift` of 4; [`released_scheduler`] makes it.
        image_processor ([`VFMTokImageProcessor`]): images to `pixel_values` and back.
        guidance_transformer ([`VFMTokDiTForImageGeneration`], *optional*):
            A weaker denoiser, such as the same one earlier in training. Guidance then leads away from its predictions
            (autoguidance, arXiv 2406.02507) instead of those without a class.
        id2label (`dict[int, str]`, *optional*):
            Class names for a denoiser whose configuration has none; synonyms are separated by commas.

    Example:

    ```python
    pipe = VFMTokDiTPipeline.from_pretrained("folder-or-repository")
    image = pipe("golden retriever", generator=torch.Generator().manual_seed(0)).images[0]
    ```
    """

    vae: VFMAEModel
    transformer: VFMTokDiTForImageGeneration | None
    scheduler: FlowMatchEulerDiscreteScheduler
    image_processor: VFMTokImageProcessor
    guidance_transformer: VFMTokDiTForImageGeneration | None

    model_cpu_offload_seq = "guidance_transformer->transformer->vae"
    _optional_components = ["transformer", "guidance_transformer"]
    _callback_tensor_inputs = ["latents"]
    _undecoded_output_type = "latent"

    # diffusers 0.36 reads these annotations and does not support `X | Y`.
    def __init__(
        self,
        vae: VFMAEModel,
        transformer: Union[VFMTokDiTForImageGeneration, None],  # noqa: UP007
        scheduler: FlowMatchEulerDiscreteScheduler,
        image_processor: VFMTokImageProcessor,
        guidance_transformer: Union[VFMTokDiTForImageGeneration, None] = None,  # noqa: UP007
        id2label: Union[dict[int, str], dict[str, str], None] = None,  # noqa: UP007
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            image_processor=image_processor,
            guidance_transformer=guidance_transformer,
        )
        if transformer is not None:
            self._generator_model()
        self._register_class_names(id2label)

    @property
    def autoencoder(self) -> VFMAEModel:
        """The autoencoder."""
        return self.vae

    @classmethod
    def from_autoencoder(
        cls, pretrained_model_name_or_path, dtype: torch.dtype | str = torch.float32
    ) -> "VFMTokDiTPipeline":
        """
        A pipeline without denoiser.

        Args:
            pretrained_model_name_or_path (`str`): folder or repository that holds a [`VFMAEModel`] alone.
            dtype (`torch.dtype`): precision of its weights.
        """
        vae = VFMAEModel.from_pretrained(pretrained_model_name_or_path, dtype=dtype)
        image_processor = VFMTokImageProcessor.from_pretrained(pretrained_model_name_or_path)
        return cls(vae, None, released_scheduler(), image_processor)

    # -- class labels -> images

    def _generator_model(self) -> VFMTokDiTForImageGeneration:
        if self.transformer is None:
            raise ValueError("This pipeline was loaded without a denoiser: load it without transformer=None.")
        expected, actual = self.vae.config.latent_shape, self.transformer.config.latent_shape
        if expected != actual:
            raise ValueError(
                f"The denoiser was made for another autoencoder: its latents have shape {actual}, the autoencoder's {expected}."
            )
        if self.guidance_transformer is not None:
            for name in ("latent_shape", "num_classes"):
                expected, actual = (
                    getattr(model.config, name) for model in (self.transformer, self.guidance_transformer)
                )
                if expected != actual:
                    raise ValueError(
                        f"guidance_transformer does not go with transformer: its {name} is {actual}, not {expected}."
                    )
        return self.transformer

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels,
        num_images_per_label: int = 1,
        num_inference_steps: int = 99,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VFMTokDiTPipeline", int, torch.Tensor, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_batch_size: int = 16,
    ) -> VFMTokPipelineOutput | tuple:
        """
        Generate images.

        Args:
            class_labels (`int`, `str` or a list of them):
                Classes by id or by name: any synonym in `id2label`, in any case.
            num_images_per_label (`int`, defaults to 1):
                The images of one label follow each other.
            num_inference_steps (`int`, defaults to 99):
                Evaluations of the denoiser by Euler's method. 99 steps connect the 100 points of the original's grid.
            guidance_scale (`float`, defaults to 1.0):
                Guidance scale: `weak + scale * (own - weak)`. 1 turns guidance off and runs the denoiser once per step. The
                weak prediction is that of `guidance_transformer`, otherwise the denoiser's own without a class
                (classifier-free guidance).
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                Smallest and largest time at which to guide; 1 is noise, 0 data.
            generator (`torch.Generator` or a list of one per image, *optional*):
                Source of the noise. With a list, an image depends on its own generator alone.
            latents (`torch.FloatTensor` of shape `(batch_size, latent_channels, grid, grid)`, *optional*):
                The noise itself, in place of `generator`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (floats in [0, 1], channels last), `"pt"` (the same, channels first), `"uint8"` (8-bit tensors,
                channels first), or `"latent"` for the autoencoder's latents, which `decode` takes.
            return_dict (`bool`, defaults to `True`): `False` returns `(images,)`.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, {"latents": latents})` after each step, with the normalized
                latents. A dictionary that it returns with `latents` replaces them. Setting `pipe._interrupt = True` in it
                stops sampling.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What the callback's dictionary holds: `latents` or nothing.
            decode_batch_size (`int`, defaults to 16): images decoded at once, which limits memory.

        Returns:
            `VFMTokPipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: unknown labels or output type, a number of images or steps below 1, a guidance scale below 1, or
                latents of another shape.
            TypeError: a number of images or steps that is not an integer.
        """
        self._check_output_type(output_type)
        check_counts(
            num_images_per_label=num_images_per_label,
            num_inference_steps=num_inference_steps,
            decode_batch_size=decode_batch_size,
        )
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale must be at least 1, which is no guidance, got {guidance_scale}.")
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)
        class_ids = [class_id for class_id in self.get_label_ids(class_labels) for _ in range(num_images_per_label)]
        device = self._execution_device
        labels = torch.tensor(class_ids, device=device)
        latents = self._prepare_latents(latents, len(class_ids), generator, device)

        # One time more than steps: the scheduler adds a last step to 0, which the original does not take.
        sigmas = 1 - torch.linspace(0, 1 - LAST_TIME, num_inference_steps + 1)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        self._interrupt = False
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for step, timestep in enumerate(self.scheduler.timesteps[:-1]):
                time = self.scheduler.sigmas[step]
                is_guided = guidance_scale > 1 and guidance_interval[0] <= time <= guidance_interval[1]
                velocity = self._velocity(latents, time.to(device), labels, guidance_scale if is_guided else 1.0)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                progress_bar.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                    returned = callback_on_step_end(self, step, timestep, tensors)
                    latents = self._check_callback_result(returned).get("latents", latents)
                if self._interrupt:
                    break
        return self._output(self.vae.denormalize_latents(latents), output_type, return_dict, decode_batch_size)

    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        num_images: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        shape = (num_images, *self._generator_model().config.latent_shape)
        if latents is None:
            check_generators(generator, num_images)
            generators = list(generator) if isinstance(generator, Sequence) else generator
            return randn_tensor(shape, generators, device, torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device, torch.float32)

    def _velocity(
        self, latents: torch.Tensor, time: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """The guided prediction in float32: a half-precision one would round the latents at every step."""
        transformer, times = self._generator_model(), time.expand(len(labels))
        if guidance_scale == 1:
            return transformer(latents, times, labels).velocity.float()
        if self.guidance_transformer is not None:
            weak = self.guidance_transformer(latents, times, labels).velocity.float()
            strong = transformer(latents, times, labels).velocity.float()
        else:
            null = torch.full_like(labels, transformer.config.num_classes)
            both = transformer(latents.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([null, labels])).velocity
            weak, strong = both.float().chunk(2)
        return weak + guidance_scale * (strong - weak)

    # -- images <-> latents

    @torch.no_grad()
    def encode(self, images: InputImages, batch_size: int = 16) -> torch.Tensor:
        """
        Latents `(number of images, latent_channels, grid, grid)` of images, not normalized.

        Args:
            images: one image of any kind that [`~vfmtok_hf.modeling.image_reading_vfmtok.read_image`] takes, a batch as
                an array or tensor, or several: a list, a generator, a column of a data set.
            batch_size (`int`, defaults to 16): images read and encoded at once, which limits memory.

        Raises:
            ValueError, TypeError, FileNotFoundError: no images, or unusable ones; a checkpoint without vision weights.
        """
        return torch.cat([encoded.latents for encoded in self._encoded_batches(images, batch_size)])

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        size: int | None = None,
        resize_mode: str = "generation",
        batch_size: int = 16,
    ) -> Images:
        """
        Images of latents.

        Args:
            latents (`torch.FloatTensor` of shape `(number of images, latent_channels, grid, grid)`): not normalized.
            output_type, size, resize_mode: as in [`VFMTokImageProcessor.postprocess`].
            batch_size (`int`, defaults to 16): images decoded at once, which limits memory.

        Raises:
            ValueError: no latents, or those of another model.
        """
        if not len(latents):
            raise ValueError("There are no latents: pass those of at least one image.")
        return self._decoded_images("latents", latents, batch_size, output_type, size, resize_mode)

    def _encode(self, images: InputImages, batch_size: int) -> torch.Tensor:
        return self.encode(images, batch_size)

    def _decode(self, undecoded: torch.Tensor, output_type: str, batch_size: int) -> Images:
        return self.decode(undecoded, output_type, batch_size=batch_size)


__all__ = ["VFMTokDiTPipeline", "released_scheduler"]
