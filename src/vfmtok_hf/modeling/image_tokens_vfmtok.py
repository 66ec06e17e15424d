"""
The `image-tokens` task of transformers' `pipeline`: images to lists of image tokens.

It lies among the models and not among the pipelines: a saved task brings its code along, and transformers copies what this file
imports from its own folder only.
"""

from transformers import Pipeline

from .image_reading_vfmtok import read_image


class VFMTokImageTokensPipeline(Pipeline):
    """
    Images to image tokens, as a transformers pipeline. The package registers it as the task `image-tokens`:

    ```python
    >>> tokenize = pipeline("image-tokens", model="folder-or-repository")
    >>> tokenize("photo.png")  # num_anchors integers
    >>> tokenize(["a.png", "b.png"], batch_size=2)  # one such list each
    ```

    Images are of any kind that [`read_image`] takes, URLs among them. `return_tensors=True` gives `(1, num_anchors)`
    int64 tensors instead of lists. A list of images, a generator of them or a `datasets` column is run in batches of
    `batch_size`.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    modelcard = None  # transformers 5.0 reads it when it saves a pipeline, and never sets it

    def _sanitize_parameters(self, timeout=None, return_tensors=None, **kwargs):
        if kwargs:
            raise TypeError(f"image-tokens takes timeout and return_tensors, not {', '.join(kwargs)}.")
        preprocess = {} if timeout is None else {"timeout": timeout}
        return preprocess, {}, {} if return_tensors is None else {"return_tensors": return_tensors}

    def preprocess(self, image, timeout=30.0):
        return self.image_processor(read_image(image, timeout=timeout), return_tensors="pt")

    def _forward(self, model_inputs):
        return {"image_tokens": self.model.encode(model_inputs["pixel_values"]).image_tokens}

    def postprocess(self, model_outputs, return_tensors=False):
        image_tokens = model_outputs["image_tokens"]
        return image_tokens if return_tensors else image_tokens[0].tolist()


__all__ = ["VFMTokImageTokensPipeline"]
