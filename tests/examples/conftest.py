"""Scripts run in the process of the tests."""

import sys

import pytest


@pytest.fixture
def run_script(monkeypatch):
    """Call the `main` of a script with options. A list is an option of several values."""

    def run_script(script, **options):
        argv = [script.__file__]
        for name, value in options.items():
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", argv)
        script.main()

    return run_script


@pytest.fixture
def refusal(run_script, capsys):
    """The error with which a script ends."""

    def refusal(script, **options):
        with pytest.raises(SystemExit):
            run_script(script, **options)
        return capsys.readouterr().err

    return refusal
