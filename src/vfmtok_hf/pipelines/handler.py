"""
What Inference Endpoints start from a saved pipeline's folder: `EndpointHandler(folder)`, called with each request.

Without this file, the Hub's inference toolkit would treat pipeline.py, which is for diffusers, as a handler in its legacy
format, and fail.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline


class EndpointHandler:
    """
    A pipeline for requests.

    Args:
        path (`str`): folder of the saved pipeline.
    """

    def __init__(self, path: str = "", **kwargs: Any):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.pipe = DiffusionPipeline.from_pretrained(path, trust_remote_code=True)
        self.pipe.to(accelerator or "cpu", torch.float32)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, data: dict[str, Any]) -> Any:
        """
        Generate the images of a request.

        Args:
            data (`dict`):
                `{"inputs": "heart", "parameters": {"seed": 0, "num_images_per_label": 2, ...}}`. `inputs` is a class by
                name or id, or a list of them. `parameters` are arguments of the pipeline, with `seed` in the place of
                `generator`: image i uses `seed + i`.

        Returns:
            `PIL.Image.Image`, or a list of them if the request asks for several.

        Raises:
            ValueError, TypeError: the request has no inputs, an unknown class, or invalid parameters.
        """
        if "inputs" not in data:
            raise ValueError('The request has no inputs: send {"inputs": class name or id}.')
        labels, parameters = data["inputs"], dict(data.get("parameters") or {})
        seed = parameters.pop("seed", None)
        if seed is not None:
            num_labels = len(labels) if isinstance(labels, list) else 1
            seeds = range(seed, seed + num_labels * parameters.get("num_images_per_label", 1))
            parameters["generator"] = [torch.Generator().manual_seed(image_seed) for image_seed in seeds]
        images = self.pipe(labels, **parameters).images
        return images[0] if len(images) == 1 else images


__all__ = ["EndpointHandler"]
