"""`vfmtok info`."""

from vfmtok_hf.cli.options import ModelOption, one_line_errors, output_console, resolve_model


def info(model: ModelOption = None) -> None:
    """Versions, device, kernel, and what the checkpoint holds."""
    with one_line_errors():
        from vfmtok_hf.cli.environment import checkpoint_facts, environment_facts

        print_facts(environment_facts())
        print_facts(checkpoint_facts(resolve_model(model)))


def print_facts(facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        output_console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
