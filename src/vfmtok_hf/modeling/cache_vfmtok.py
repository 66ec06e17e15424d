"""The cache of a generator's decode steps, in tensors with fixed shapes and addresses."""

import torch
from torch import nn


def kind_of(tensor: torch.Tensor) -> tuple:
    """Properties that must be equal to copy one tensor into another."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.is_inference()


def at_position(states: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Select `(rows, 1, size)` from `(rows, length, size)` states: `position` is `()` for all rows, or `(rows,)`."""
    if position.ndim == 0:
        return states.index_select(1, position[None])
    return states.take_along_dim(position[:, None, None], dim=1)


class FixedTensors(nn.Module):
    """A module with buffers, which torch.compile treats as tensors with fixed addresses, as CUDA graphs require."""

    def store(self, name: str, tensor: torch.Tensor) -> None:
        """Store `tensor`, by copying it into the buffer of that name if the shape matches."""
        buffer = getattr(self, name, None)
        if buffer is not None and kind_of(buffer) == kind_of(tensor):
            buffer.copy_(tensor)
        else:
            self.register_buffer(name, tensor)


class LayerCache(FixedTensors):
    """
    Keys and values of one attention layer, `(batch_size, heads, max_length, head_dim)`.

    Batch, heads, dtype and device follow the first keys, also with autocast and offloading. On CPUs, the cache is at least
    float32, because torch's half-precision matmuls need dense operands there and would copy the visible part in every
    step.

    Args:
        max_length (`int`): length of the whole sequence.
    """

    keys: torch.Tensor
    values: torch.Tensor
    modulations: torch.Tensor  # RAR only

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length

    def update(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        position: int | torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Store keys and values, and return those to attend to.

        Args:
            keys, values (`torch.Tensor` of shape `(rows, heads, length, head_dim)`):
                Keys and values of the first positions of a sequence, or of the single one at `position`, for the first rows.
            position (`int` or `torch.LongTensor` of shape `()` or `(rows,)`, *optional*):
                One for all rows, or one per row. Returned by `DecodeCache.position_and_mask`; None for the first positions.
            attention_mask (`torch.Tensor` of shape `(1 or rows, 1, 1, visible_length)`, *optional*):
                For a single position, unless it is an `int`: then all earlier ones are visible.

        Returns:
            `tuple(torch.Tensor)`: the arguments if they start the sequence, otherwise the cached ones of these rows, `(rows,
            heads, visible_length, head_dim)`.
        """
        if position is None:
            dtype = torch.promote_types(keys.dtype, torch.float32) if keys.is_cpu else keys.dtype
            # Zeros, because masked values have weight 0, and 0 * NaN is NaN.
            padding = (0, 0, 0, self.max_length - keys.shape[2])
            self.store("keys", nn.functional.pad(keys.to(dtype), padding))
            self.store("values", nn.functional.pad(values.to(dtype), padding))
            return keys, values
        own_keys, own_values = self.keys[: keys.shape[0]], self.values[: keys.shape[0]]
        for cached, new in ((own_keys, keys), (own_values, values)):
            if isinstance(position, int):
                cached[:, :, position : position + 1] = new
            elif position.ndim == 0:
                cached[:, :, position[None]] = new.to(cached.dtype)
            else:
                cached[torch.arange(len(new), device=new.device), :, position] = new[:, :, 0].to(cached.dtype)
        length = position + 1 if attention_mask is None else attention_mask.shape[-1]
        return own_keys[:, :, :length], own_values[:, :, :length]


class DecodeCache(FixedTensors):
    """
    The state of a generation: a [`LayerCache`] per layer, and precomputed tensors of the condition.

    Steps use the first rows of the tensors, one per token. After guidance ends, the rows of the unconditional half, which
    come last, are no longer read.

    Args:
        num_layers (`int`): number of layers of the generator.
        max_length (`int`): length of the whole sequence without its last token, which no step reads.
        num_lengths (`int`, *optional*): number of different lengths that `show` rounds up to. By default it does not round.
    """

    condition_embeds: torch.Tensor
    # RAR only.
    position_embeds: torch.Tensor
    conditions: torch.Tensor
    first_modulated: torch.Tensor
    norm_modulations: torch.Tensor

    def __init__(self, num_layers: int, max_length: int, num_lengths: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(LayerCache(max_length) for _ in range(num_layers))
        self.max_length = max_length
        self.visible_length = max_length
        # Rounded up to a multiple of 8, because CUDA's attention copies a mask of other lengths.
        self.length_step = 1 if num_lengths is None else -(-max_length // (8 * num_lengths)) * 8
        self.shows_filled = False  # whether all visible positions are filled after a step
        self.modulated_steps = 0  # following steps with precomputed modulations (RAR)

    def show(self, length: int, filled: bool = False) -> None:
        """
        Limit steps to the first `length` positions, rounded up to one of `num_lengths` lengths.

        Args:
            length (`int`): number of visible positions.
            filled (`bool`): the next step fills the last of them, in all rows. If lengths are not rounded, it needs no mask.
        """
        self.visible_length = min(-(-length // self.length_step) * self.length_step, self.max_length)
        self.shows_filled = filled and self.length_step == 1

    def position_and_mask(self, position: torch.Tensor) -> tuple[int | torch.Tensor, torch.Tensor | None]:
        """
        Where a step at `position` `()` or `(rows,)` stores keys and values, and the mask of its attention scores.

        Returns:
            `position`, and a mask `(1 or rows, 1, 1, visible_length)`, the lowest number after `position`. If all visible
            positions are filled, the last of them as a Python number, and None.
        """
        if self.shows_filled and position.ndim == 0:
            return self.visible_length - 1, None
        dtype = self.layers[0].keys.dtype
        hidden = torch.arange(self.visible_length, device=position.device) > position.reshape(-1, 1, 1, 1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=position.device)
        # Not -inf: compiled softmax on CPUs subtracts the maximum of each lane, which may contain only masked positions.
        return position, mask.masked_fill(hidden, torch.finfo(dtype).min)

    def embeds_at(self, position: torch.Tensor, token_embeds: torch.Tensor) -> torch.Tensor:
        """
        `(rows, hidden_size)`: the condition's embeddings where `position` `()` or `(rows,)` belongs to it, otherwise
        `token_embeds`.
        """
        num_conditions = self.condition_embeds.shape[1]
        index = position.clamp(max=num_conditions - 1)
        condition_embeds = at_position(self.condition_embeds[: token_embeds.shape[0]], index)[:, 0]
        return torch.where(position[..., None] < num_conditions, condition_embeds, token_embeds)


__all__ = ["DecodeCache", "LayerCache", "at_position"]
