"""`vfmtok train tokenizer` and `vfmtok train generator`."""

from functools import partial

import typer


train_app = typer.Typer(help="Train image tokenizers and generators.", no_args_is_help=True)
# The trainers have a parser of their own, which also knows --help.
OWN_PARSER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@train_app.command(context_settings=OWN_PARSER)
def tokenizer(context: typer.Context) -> None:
    """Train the image tokenizer on images. `--help` lists its arguments."""
    from vfmtok_hf.training.logs import run_script
    from vfmtok_hf.training.train_tokenizer import main

    run_script(partial(main, context.args))


@train_app.command(context_settings=OWN_PARSER)
def generator(context: typer.Context) -> None:
    """Train a class-conditional generator of image tokens. `--help` lists its arguments."""
    from vfmtok_hf.training.logs import run_script
    from vfmtok_hf.training.train_generator import main

    run_script(partial(main, context.args))
