"""`vfmtok serve`."""

import socket
from typing import Annotated
from urllib.parse import urlsplit

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


def http_url(text: str) -> str:
    """
    Validate the URL of an engine.

    Raises:
        typer.BadParameter: it is not an HTTP address.
    """
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise typer.BadParameter(f"{text!r} is not a URL like http://HOST:8001.")
    return text


def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="`0.0.0.0` accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    max_batch_size: Annotated[
        int, typer.Option(min=2, help="Images generated at once, by each engine. Here one with guidance counts twice.")
    ] = 32,
    max_queue_size: Annotated[int, typer.Option(min=1, help="Images that may wait. Others are refused (429).")] = 256,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VFMTOK_API_KEY", show_envvar=True, help="Bearer token that clients must send."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            parser=http_url,
            metavar="URL",
            help="URL of a vLLM server that generates the tokens. *May be repeated: they share the work.*",
        ),
    ] = None,
    engine_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which an image is requested from another engine.")
    ] = 120,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """
    Serve a pipeline over HTTP: OpenAI's images API, and the Hub's.

    `vfmtok serve --model REPOSITORY --port 8000`

    `vfmtok serve --model REPOSITORY --engine http://HOST:8001 --engine http://HOST:8002`
    """
    with one_line_errors("serve"):
        import uvicorn

        from vfmtok_hf import VFMTokPipeline
        from vfmtok_hf.serving.app import create_app, name_of_model
        from vfmtok_hf.serving.engines import VLLMEngine, without_weights

        name_or_path = resolve_model(model)
        with bound_socket(host, port) as listener:
            pipe = load_pipeline(model, device, dtype, generates=not engine)
            token_engines = []
            if engine:
                generator = without_weights(name_or_path)
                pipe = VFMTokPipeline(pipe.vq_model, generator, pipe.image_processor, pipe.config.id2label)
                token_engines = [VLLMEngine(url, generator, engine_timeout) for url in engine]
            app = create_app(
                pipe,
                name_of_model(name_or_path),
                max_batch_size,
                max_queue_size,
                api_key,
                token_engines=token_engines,
            )
            uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=DRAIN_SECONDS)).run(sockets=[listener])


def bound_socket(host: str, port: int) -> socket.socket:
    """Reserve the port before the model is loaded. Connections are refused until the server runs."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener
