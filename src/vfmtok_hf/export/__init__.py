"""The graphs of a pipeline as ONNX files, as `torch.export` programs, or in a web page."""

from .pipeline import ExportedPart, export_pipeline
from .web import export_web_page


__all__ = ["ExportedPart", "export_pipeline", "export_web_page"]
