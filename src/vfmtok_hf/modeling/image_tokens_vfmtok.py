"""
The `image-tokens` task of transformers' `pipeline`, which encodes images to lists of image tokens.

It is in this folder because a saved task includes its code, and transformers copies only imports from the same folder.
"""

from transformers import Pipeline

from .image_reading_vfmtok import read_image


class VFMTokImageTokensPipeline(Pipeline):
    """
    A transformers pipeline that encodes images to image tokens, registered as the task `image-tokens`:

    ```python
    >>> tokenize = pipeline("image-tokens", model="folder-or-repository")
    >>> tokenize("photo.png")  # num_anchors integers
    >>> tokenize(["a.png", "b.png"], batch_size=2)  # one list per image
    ```

    An image is anything that [`read_image`] reads, including URLs. `return_tensors=True` returns `(1, num_anchors)` int64
    tensors instead of lists. Lists, generators and `datasets` columns are run in batches of `batch_size`.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    modelcard = None  # transformers 5.0 reads it when it saves a pipeline, and never sets it

    def _sanitize_parameters(self, timeout=None, return_tensors=None, **kwargs):
        if kwargs:
            raise TypeError(f"image-tokens accepts timeout and return_tensors, not {', '.join(kwargs)}.")
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
