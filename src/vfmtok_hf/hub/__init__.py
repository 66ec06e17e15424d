"""Publishing on the Hub: model cards, pushes, released checkpoints."""

from .cards import model_card, read_metrics, sample_grid
from .pushes import PushError, PushReport, push, push_checkpoint
from .saved_models import SavedModel, read_saved_model


__all__ = [
    "PushError",
    "PushReport",
    "SavedModel",
    "model_card",
    "push",
    "push_checkpoint",
    "read_metrics",
    "read_saved_model",
    "sample_grid",
]
