"""`vfmtok serve`."""

import socket
from pathlib import Path
from typing import Annotated

import typer

from vfmtok_hf.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    load_pipeline,
    one_line_errors,
    resolve_model,
)


# Seconds that requests have to end after SIGTERM.
DRAIN_SECONDS = 60


def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="`0.0.0.0` lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    max_batch_size: Annotated[
        int, typer.Option(min=2, help="Images generated at once. One with guidance counts twice.")
    ] = 32,
    max_queue_size: Annotated[int, typer.Option(min=1, help="Images that may wait. Others are refused (429).")] = 256,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VFMTOK_API_KEY", show_envvar=True, help="Bearer token that clients must send."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """
    Serve a pipeline over HTTP: OpenAI's images API, and the Hub's.

    `vfmtok serve --model REPOSITORY --port 8000`
    """
    with one_line_errors("serve"):
        import uvicorn

        from vfmtok_hf.serving.app import create_app

        name_or_path = resolve_model(model)
        model_name = Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path
        with bound_socket(host, port) as listener:
            pipe = load_pipeline(model, device, dtype, generates=True)
            app = create_app(pipe, model_name, max_batch_size, max_queue_size, api_key)
            uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=DRAIN_SECONDS)).run(sockets=[listener])


def bound_socket(host: str, port: int) -> socket.socket:
    """Reserve the port before the model is loaded. Connections are refused until the server runs."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener
