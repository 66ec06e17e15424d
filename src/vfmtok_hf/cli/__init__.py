"""The `vfmtok` command, one file per group of commands."""

from .main import app


__all__ = ["app"]
