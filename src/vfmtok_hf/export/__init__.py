"""The graphs of a pipeline as ONNX files or `torch.export` programs."""

from .pipeline import ExportedPart, export_pipeline


__all__ = ["ExportedPart", "export_pipeline"]
