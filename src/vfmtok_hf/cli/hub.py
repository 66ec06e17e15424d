"""`vfmtok push`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vfmtok_hf.cli.options import one_line_errors, output_console, quiet_libraries


def push(
    source: Annotated[
        Path, typer.Argument(help="Folder of a saved model, or with `--convert` an original checkpoint.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPOSITORY", help="Such as `you/vfmtok-ar-b`.")],
    convert: Annotated[
        Literal["tokenizer", "ar", "rar", "vfmae", "dit"] | None,
        typer.Option(help="Convert the original checkpoint first."),
    ] = None,
    vision_model: Annotated[
        str | None,
        typer.Option(help="With `--convert tokenizer` or `vfmae`: vision model to include, a repository or folder."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With a generator: image tokenizer or VFMAE to publish with it, as a pipeline.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With `--convert`: JSON object of fields that cannot be inferred from shapes.")
    ] = None,
    latent_statistics: Annotated[
        Path | None,
        typer.Option(help="With `--convert vfmae`: `released`, or a file of the statistics that denoisers need."),
    ] = None,
    license: Annotated[str, typer.Option(help="License of the weights, in the Hub's notation.")] = "apache-2.0",
    base_model: Annotated[str | None, typer.Option(help="Repository from which the weights are derived.")] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(help="JSON list of metrics for the card, with the fields of the Hub's `model-index`."),
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Result file of `vfmtok evaluate` for the card. *May be repeated.*")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Images to generate for the card of a pipeline.")] = 0,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print files and card, without uploading anything.")
    ] = False,
) -> None:
    """
    Upload a model with its card and code to the Hub.

    `vfmtok push runs/mine/model you/mine --dry-run`
    """
    with one_line_errors():
        if not source.exists():
            raise FileNotFoundError(f"There is no file or folder {source}: pass the folder of a saved model.")
        if "/" not in repo_id:
            raise ValueError(f"REPOSITORY needs a namespace, your user name or an organization: you/{repo_id}.")
        quiet_libraries()

        from vfmtok_hf import hub
        from vfmtok_hf.evaluation.results import measured_results

        # Options that are not set on the command line use what is known about the checkpoint.
        given = {"license": license, "base_model": base_model, "metrics": metrics and hub.read_metrics(metrics)}
        options = {name: value for name, value in given.items() if value is not None}
        options["results"] = [figure for file in results or [] for figure in measured_results(file)]
        options |= {"samples": samples, "private": private, "dry_run": dry_run}
        if convert is not None:
            report = hub.push_checkpoint(
                source, repo_id, convert, vision_model, tokenizer, config, latent_statistics, **options
            )
        elif (vision_model, tokenizer, config, latent_statistics) == (None, None, None, None):
            report = hub.push(source, repo_id, **options)
        else:
            raise ValueError("--vision-model, --tokenizer, --config and --latent-statistics go with --convert.")
        output_console.print(report.summary(), markup=False, highlight=False, soft_wrap=True)
