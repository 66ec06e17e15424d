"""`vfmtok info`."""

from typing import Annotated

import typer

from vfmtok_hf.cli.options import (
    ModelOption,
    one_line_errors,
    output_console,
    quiet_libraries,
    resolve_model,
    saved_classes,
)


def info(
    model: ModelOption = None,
    labels: Annotated[bool, typer.Option("--labels", help="Print the numbers and names of the classes.")] = False,
) -> None:
    """Print versions, device, kernel and checkpoint."""
    with one_line_errors():
        name_or_path = resolve_model(model)
        if labels:
            print_facts({str(number): name for number, name in class_names(name_or_path).items()})
            return
        quiet_libraries()
        from vfmtok_hf.cli.environment import checkpoint_facts, environment_facts

        print_facts(environment_facts())
        print_facts(checkpoint_facts(name_or_path))


def class_names(name_or_path: str) -> dict[int, str]:
    """
    Names of the classes of a pipeline.

    Raises:
        OSError: there is no pipeline with a generator.
        ValueError: its classes have no names.
    """
    classes = saved_classes(name_or_path)
    names = classes[0] if classes is not None else {}
    if classes is None:
        from transformers import AutoConfig

        names = AutoConfig.from_pretrained(name_or_path, subfolder="transformer").id2label or {}
    if not names:
        raise ValueError(f"The classes of {name_or_path} have numbers and no names.")
    return names


def print_facts(facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        output_console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
