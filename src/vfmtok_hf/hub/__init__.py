"""Publishing on the Hub: model cards, pushes, released checkpoints."""

from .cards import draw_samples, model_card, read_metrics
from .pushes import PushError, PushReport, push, push_checkpoint
from .saved_models import SavedModel, read_saved_model


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
