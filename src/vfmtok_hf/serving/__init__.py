"""An HTTP server for a pipeline."""
