"""What the diffusers pipelines of this package share: loading and saving with their code, classes, batches of images."""

import base64
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.dynamic_modules_utils import resolve_trust_remote_code
from huggingface_hub import snapshot_download
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.image_utils import ImageInput
from transformers.utils import logging

from vfmtok_hf.modeling.class_names_vfmtok import ClassNames
from vfmtok_hf.modeling.image_reading_vfmtok import each_image
from vfmtok_hf.modeling.loading_vfmtok import errors_naming

from .portable_vfmtok import use_this_code, write_portable_code


ClassLabels = int | str | Sequence[int | str]
InputImages = ImageInput | str | bytes | os.PathLike | Iterable[Any]
Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor

logger = logging.get_logger("vfmtok_hf.pipelines")

# diffusers' name for the dtype of a pipeline. Remove it when 0.40 is the lowest version.
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"

# Weight files without and with a variant in their name.
DEFAULT_WEIGHTS = ("*/model.safetensors", "*/model-*.safetensors", "*/model.safetensors.index.json")
VARIANT_WEIGHTS = ("*/model.*.safetensors", "*/model.safetensors.index.*.json")


class VFMTokPipelineOutput(ImagePipelineOutput):
    """diffusers' `ImagePipelineOutput`, which a notebook shows as images."""

    def _repr_html_(self) -> str | None:
        if not all(isinstance(image, PIL.Image.Image) for image in self.images):
            return None  # the notebook falls back to `repr`
        encoded = (base64.b64encode(image._repr_png_()).decode() for image in self.images)
        return "".join(
            f'<img src="data:image/png;base64,{png}" style="min-width: 128px; margin: 2px">' for png in encoded
        )


def check_counts(**counts: int) -> None:
    """
    Check numbers of images or steps, which errors call by their keyword.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is below 1.
    """
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise TypeError(f"{name} must be an integer, got {count!r}.")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")


def check_generators(generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int) -> None:
    """Raise `ValueError` for a list of generators that is not one per image."""
    if isinstance(generator, Sequence) and len(generator) != num_images:
        raise ValueError(f"Got {len(generator)} generators for {num_images} images: pass one, or one per image.")


def batches(items: Iterable[Any], batch_size: int) -> Iterator[list[Any]]:
    """Consecutive items, `batch_size` at a time; the last batch may be smaller. Raises the errors of [`check_counts`]."""
    check_counts(batch_size=batch_size)
    remaining = iter(items)
    while batch := list(islice(remaining, batch_size)):
        yield batch


def concatenate(parts: list[Images]) -> Images:
    """Concatenate batches of any output type."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [image for part in parts for image in part]


def use_compiled_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Enable compiled deformable attention if it is found and the user has not chosen."""
    try:
        from vfmtok_hf.hub_kernels import use_found_kernels
    except ImportError:  # this file is also loaded from Hub repositories, without the package
        return
    use_found_kernels(model, device)


def to_device_of(model: PreTrainedModel, tensor: torch.Tensor) -> torch.Tensor:
    """An input on the device of the model that is to read it."""
    # accelerate's hooks move a model's inputs themselves, and offloaded weights do not show the device.
    return tensor if hasattr(model, "_hf_hook") else tensor.to(model.device)


PipelineT = TypeVar("PipelineT", bound="VFMTokPipelineBase")


class VFMTokPipelineBase(DiffusionPipeline):
    """
    Base of the pipelines that generate images of classes by a component `transformer`. They bring their code along when they
    are saved.
    """

    transformer: Any
    _undecoded_output_type: str  # the output type of what the generator samples, instead of images
    _interrupt = False

    @property
    def autoencoder(self) -> Any:
        """The model that encodes and decodes images."""
        raise NotImplementedError

    def _encode(self, images: InputImages, batch_size: int) -> torch.Tensor:
        """What the generator would sample for images."""
        raise NotImplementedError

    def _decode(self, undecoded: torch.Tensor, output_type: str, batch_size: int) -> Images:
        """Images of what the generator samples."""
        raise NotImplementedError

    def _generator_model(self) -> Any:
        """
        The generator.

        Raises:
            ValueError: there is none, or it does not fit the other components.
        """
        raise NotImplementedError

    def _register_class_names(self, id2label: dict[int, str] | dict[str, str] | None) -> None:
        """Keep `id2label`, and give it to a generator whose configuration has no names. Warn if it has other names."""
        self.register_to_config(id2label=id2label)
        given = {int(class_id): name for class_id, name in (id2label or {}).items()}
        if self.transformer is None or not given:
            return
        if self.transformer.config.id2label is None:
            self.transformer.config.id2label = given
        elif given != self.id2label:
            logger.warning(
                "id2label is not used, because the generator has names: change transformer.config.id2label."
            )

    @classmethod
    def from_pretrained(cls: type[PipelineT], pretrained_model_name_or_path, **kwargs) -> PipelineT:
        """
        As in diffusers, except that the dtype is float32 by default, for any precision of the files. Half precision saves disk
        space, but is slow on CPUs and may overflow.

        Raises:
            OSError: the folder, repository, revision or file does not exist or is not accessible.
            ValueError: a file is damaged or belongs to another pipeline, or a component has its own code, which needs
                `trust_remote_code=True`.
        """
        if "torch_dtype" not in kwargs:  # the older name, which diffusers also accepts
            dtype = kwargs.pop("dtype", torch.float32)
            # diffusers replaces a name by float32, but passes the entries of a dictionary on to the models.
            kwargs[DTYPE] = {"default": dtype} if isinstance(dtype, str) else dtype
        passed = kwargs.get("transformer")
        if passed is not None and passed.config.id2label is not None:
            kwargs.setdefault("id2label", None)  # those of the saved generator
        with errors_naming(str(pretrained_model_name_or_path)):
            if os.path.isdir(pretrained_model_name_or_path):  # `download` checks repositories
                cls._check_code(pretrained_model_name_or_path, kwargs)
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """
        As in diffusers, but with the package's classes instead of a saved pipeline's copies of them.

        Raises:
            ValueError: it is another class of pipeline.
        """
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        use_this_code(index)
        if index["_class_name"] not in {base.__name__ for base in cls.__mro__}:
            raise ValueError(
                f"This is a {index['_class_name']}, not a {cls.__name__}: load it with from_pretrained of its own class."
            )
        return loaded

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        As in diffusers, and also save the pipeline's code. Folders and repositories by `save_pretrained` and `push_to_hub` load
        without this package, with `DiffusionPipeline.from_pretrained(path, trust_remote_code=True)`.
        """
        self.register_to_config(id2label=self.id2label or None)
        super().save_config(save_directory, push_to_hub, **kwargs)
        write_portable_code(save_directory)

    @classmethod
    def download(
        cls,
        pretrained_model_name: str,
        variant: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool | None = False,
        **kwargs,
    ) -> str:
        """
        Download a pipeline's repository to the cache, and return its folder. Afterwards, it loads offline.

        Only the weights of other variants and the components passed to `from_pretrained` are skipped. diffusers' own
        `download` also skips the generator's `generation_config.json`.

        Args:
            variant (`str`, *optional*): such as `"fp16"`; every model of the repository must have it.
            cache_dir, revision, token, force_download, local_files_only: as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: it is another pipeline, or a component has its own code, which needs `trust_remote_code=True`.
        """
        other_weights = VARIANT_WEIGHTS if variant is None else DEFAULT_WEIGHTS
        passed_components = [f"{name}/*" for name in cls._get_signature_keys(cls)[0] if name in kwargs]
        folder = snapshot_download(
            pretrained_model_name,
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            force_download=force_download,
            local_files_only=bool(local_files_only),
            ignore_patterns=[*other_weights, *passed_components],
        )
        cls._check_code(folder, kwargs)
        return folder

    @classmethod
    def _check_code(cls, folder: str | os.PathLike, kwargs: dict[str, Any]) -> None:
        """Require `trust_remote_code` for components that are not passed and have their own code."""
        # diffusers before 0.38 checks this only in its own `download`. These are the files that it would run.
        has_code = any(
            isinstance(entry, list) and name not in kwargs and Path(folder, name, f"{entry[0]}.py").is_file()
            for name, entry in cls.load_config(folder).items()
        )
        resolve_trust_remote_code(kwargs.get("trust_remote_code", False), folder, has_code)

    @property
    def id2label(self) -> dict[int, str]:
        """The generator's class names, `transformer.config.id2label`."""
        names = self.config.id2label if self.transformer is None else self.transformer.config.id2label
        return {int(class_id): name for class_id, name in (names or {}).items()}

    @property
    def interrupt(self) -> bool:
        """Whether to stop sampling after the current step. Set `pipe._interrupt = True` in a callback to stop."""
        return self._interrupt

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        Convert `class_labels`, one or several ids or names, to class ids.

        Raises:
            ValueError: an unknown or ambiguous name, with the closest matches; an id out of range; an empty list.
            TypeError: labels that are neither names nor integers.
        """
        return ClassNames(self.id2label).find_all(class_labels, self._generator_model().config.num_classes)

    def _check_output_type(self, output_type: str) -> None:
        if output_type not in ("pil", "np", "pt", "uint8", self._undecoded_output_type):
            raise ValueError(
                f"output_type must be 'pil', 'np', 'pt', 'uint8' or {self._undecoded_output_type!r}, got {output_type!r}."
            )

    def _check_callback_inputs(self, names: Sequence[str]) -> None:
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may contain {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )

    @staticmethod
    def _check_callback_result(result: Any) -> dict[str, Any]:
        """What `callback_on_step_end` replaces: nothing if it returns None."""
        if result is not None and not isinstance(result, dict):
            raise TypeError(f"callback_on_step_end returns a dictionary or None, got {type(result).__name__}.")
        return result or {}

    def _output(
        self, undecoded: torch.Tensor, output_type: str, return_dict: bool, batch_size: int
    ) -> VFMTokPipelineOutput | tuple:
        images = undecoded
        if output_type != self._undecoded_output_type:
            images = self._decode(undecoded, output_type, batch_size)
        self.maybe_free_model_hooks()
        return VFMTokPipelineOutput(images=images) if return_dict else (images,)

    def _encoded_batches(self, images: InputImages, batch_size: int) -> Iterator[Any]:
        """
        The autoencoder's outputs for `batch_size` images at a time.

        Raises:
            ValueError, TypeError, FileNotFoundError: images are missing or invalid, or the checkpoint has no vision weights.
        """
        use_compiled_attention(self.autoencoder, self._execution_device)
        batch = None
        for batch in batches(each_image(images), batch_size):
            pixel_values = self.image_processor(batch, return_tensors="pt")["pixel_values"]
            yield self.autoencoder.encode(to_device_of(self.autoencoder, pixel_values))
        if batch is None:
            raise ValueError("There are no images: pass at least one.")

    def _decoded_images(
        self, name: str, rows: torch.Tensor, batch_size: int, output_type: str, size: int | None, resize_mode: str
    ) -> Images:
        """Images of `rows`, the autoencoder's argument `name`, decoded `batch_size` at a time."""
        parts = []
        for batch in batches(rows, batch_size):
            decoded = self.autoencoder.decode(**{name: to_device_of(self.autoencoder, torch.stack(batch))})
            parts.append(self.image_processor.postprocess(decoded.reconstruction, output_type, size, resize_mode))
        return concatenate(parts)

    @torch.no_grad()
    def reconstruct(
        self, images: InputImages, output_type: str = "pil", return_dict: bool = True, batch_size: int = 16
    ) -> VFMTokPipelineOutput | tuple:
        """
        Reconstruct images from their image tokens or latents, cropped and at the model's size.

        Args:
            images: an image that [`~vfmtok_hf.modeling.image_reading_vfmtok.read_image`] reads, a batch as an array or
                tensor, or a list, generator or data set column of images.
            output_type (`str`), return_dict (`bool`): as in `__call__`.
            batch_size (`int`, defaults to 16): images per batch, which limits memory.

        Raises:
            ValueError, TypeError, FileNotFoundError: images are missing or invalid, or the checkpoint has no vision weights.
        """
        self._check_output_type(output_type)
        return self._output(self._encode(images, batch_size), output_type, return_dict, batch_size)


__all__ = ["VFMTokPipelineBase"]
