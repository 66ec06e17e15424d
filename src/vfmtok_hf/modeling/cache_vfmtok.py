"""What a generator keeps from one decode step to the next, in tensors whose shapes and addresses never change."""

import torch
from torch import nn


# Lengths of the filled part that decode steps distinguish. With the drop of the unconditional rows, which comes once, a
# generation has 8 shapes at most.
NUM_BUCKETS = 7


def kind_of(tensor: torch.Tensor) -> tuple:
    """What two tensors must have in common for the one to take the other's values."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.is_inference()


class FixedTensors(nn.Module):
    """A module for its buffers: torch.compile knows that those keep their addresses, which CUDA graphs rely on."""

    def store(self, name: str, tensor: torch.Tensor) -> None:
        """Keep `tensor`, by copying it into the buffer of that name if it fits there."""
        buffer = getattr(self, name, None)
        if buffer is not None and kind_of(buffer) == kind_of(tensor):
            buffer.copy_(tensor)
        else:
            self.register_buffer(name, tensor)


class LayerCache(FixedTensors):
    """
    Keys and values of one attention layer, `(batch_size, heads, max_length, head_dim)`.

    The first keys decide on batch, heads, dtype and device, so that autocast and offloading need no word here. On CPUs the
    cache is float32 at least: of half precision torch's products want dense operands there, and copy what is visible in
    every step.

    Args:
        max_length (`int`): positions of the whole sequence.
    """

    keys: torch.Tensor
    values: torch.Tensor
    modulations: torch.Tensor  # of a RAR

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length

    def update(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        position: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Keep keys and values, and return those to attend to.

        Args:
            keys, values (`torch.Tensor` of shape `(rows, heads, length, head_dim)`):
                Of the first positions of a sequence, or of the single one at `position`, of the first rows.
            position (`torch.LongTensor` of shape `()`, *optional*).
            attention_mask (`torch.Tensor` of shape `(1, 1, 1, visible_length)`, *optional*): for a single position.

        Returns:
            `tuple(torch.Tensor)`: the arguments, if they begin the sequence; else what is cached of these rows, `(rows,
            heads, visible_length, head_dim)`.
        """
        if position is None:
            dtype = torch.promote_types(keys.dtype, torch.float32) if keys.is_cpu else keys.dtype
            # Zeros, since a hidden value has the weight 0, which NaN would survive.
            padding = (0, 0, 0, self.max_length - keys.shape[2])
            self.store("keys", nn.functional.pad(keys.to(dtype), padding))
            self.store("values", nn.functional.pad(values.to(dtype), padding))
            return keys, values
        own_keys, own_values = self.keys[: keys.shape[0]], self.values[: keys.shape[0]]
        own_keys[:, :, position[None]] = keys.to(own_keys.dtype)
        own_values[:, :, position[None]] = values.to(own_values.dtype)
        length = attention_mask.shape[-1]
        return own_keys[:, :, :length], own_values[:, :, :length]


class DecodeCache(FixedTensors):
    """
    The state of a generation: a [`LayerCache`] per layer, and what the model computed of the condition.

    Steps write and read the first rows of its tensors, as many as they have tokens: once guidance ends, those of the
    unconditional half, which come last, are just not read any more.

    Args:
        num_layers (`int`): of the generator.
        max_length (`int`): positions of the whole sequence, that of its last token, which no step reads, left out.
    """

    condition_embeds: torch.Tensor
    # Of a RAR.
    position_embeds: torch.Tensor
    conditions: torch.Tensor
    first_modulated: torch.Tensor
    norm_modulations: torch.Tensor

    def __init__(self, num_layers: int, max_length: int):
        super().__init__()
        self.layers = nn.ModuleList(LayerCache(max_length) for _ in range(num_layers))
        self.max_length = max_length
        self.visible_length = max_length
        self.modulated = range(0)  # positions whose modulations a RAR has computed

    def show(self, length: int) -> None:
        """Have steps look at the first positions, `length` of them or up to the end of the bucket in which that lies."""
        bucket = -(-self.max_length // NUM_BUCKETS)
        self.visible_length = min(-(-length // bucket) * bucket, self.max_length)

    def mask(self, position: torch.Tensor) -> torch.Tensor:
        """`(1, 1, 1, visible_length)` to add to attention scores: the lowest number behind `position` `()`."""
        dtype = self.layers[0].keys.dtype
        mask = torch.zeros(1, 1, 1, self.visible_length, dtype=dtype, device=position.device)
        hidden = torch.arange(self.visible_length, device=position.device) > position
        # Not -inf: compiled softmax on CPUs subtracts the maximum of each lane, which may see hidden positions alone.
        return mask.masked_fill(hidden, torch.finfo(dtype).min)

    def embeds_at(self, position: torch.Tensor, token_embeds: torch.Tensor) -> torch.Tensor:
        """`(rows, hidden_size)`: embeddings of the condition if `position` `()` is one of its, else `token_embeds`."""
        num_conditions = self.condition_embeds.shape[1]
        index = position.clamp(max=num_conditions - 1)[None]
        condition_embeds = self.condition_embeds[: token_embeds.shape[0]].index_select(1, index)[:, 0]
        return torch.where(position < num_conditions, condition_embeds, token_embeds)


__all__ = ["DecodeCache", "LayerCache"]
