"""`python -m vfmtok_hf`: the `vfmtok` command, for launchers that need a module."""

from vfmtok_hf.cli import app


if __name__ == "__main__":
    app()
