"""Export a pipeline to ONNX files, `torch.export` programs or a web page."""

from .pipeline import ExportedPart, export_pipeline
from .web import export_web_page


__all__ = ["ExportedPart", "export_pipeline", "export_web_page"]
