"""An HTTP server for a pipeline: requests, the batch that they share, and the routes."""
