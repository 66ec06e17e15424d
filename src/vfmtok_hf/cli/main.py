"""
The `vfmtok` command and its subcommands.

Exit codes: 0 success, 1 failure with one line on stderr, 2 wrong usage. Commands import what they need when they run, so
`--help` stays fast.
"""

from typing import Annotated

import typer

from vfmtok_hf import __version__
from vfmtok_hf.cli.convert import convert_app
from vfmtok_hf.cli.evaluate import evaluate_app
from vfmtok_hf.cli.export import export
from vfmtok_hf.cli.generate import ManyLabelsCommand, generate, inpaint
from vfmtok_hf.cli.hub import push
from vfmtok_hf.cli.info import info
from vfmtok_hf.cli.options import output_console
from vfmtok_hf.cli.serve import serve
from vfmtok_hf.cli.tokenize import detokenize, reconstruct, tokenize
from vfmtok_hf.cli.training import extract_tokens, plot, train_app


app = typer.Typer(
    name="vfmtok",
    help="VFMTok: generate images from class labels, and encode images to image tokens and back.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def print_version(is_wanted: bool) -> None:
    if is_wanted:
        output_console.print(f"vfmtok-hf {__version__}", highlight=False)
        raise typer.Exit


@app.callback(help=app.info.help)
def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


app.command(cls=ManyLabelsCommand)(generate)
app.command()(inpaint)
app.command()(tokenize)
app.command()(detokenize)
app.command()(reconstruct)
app.command("extract-tokens")(extract_tokens)
app.command()(export)
app.command()(info)
app.command()(plot)
app.command()(push)
app.command()(serve)
app.add_typer(convert_app, name="convert")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(train_app, name="train")
