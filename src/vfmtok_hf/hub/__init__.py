"""Publishing on the Hub: model cards, pushes, released checkpoints."""

from .publishing import (
    PushError,
    PushReport,
    SavedModel,
    draw_samples,
    model_card,
    push,
    push_checkpoint,
    read_metrics,
    read_saved_model,
)


__all__ = [
    "PushError",
    "PushReport",
    "SavedModel",
    "draw_samples",
    "model_card",
    "push",
    "push_checkpoint",
    "read_metrics",
    "read_saved_model",
]
