"""The error for invalid checkpoints, as opposed to invalid arguments."""


class CheckpointError(ValueError):
    """A checkpoint file is damaged, of another type, or does not match its model. The message is one line."""


def listing(names: list[str], limit: int = 1) -> str:
    """`'a'`, or `'a' (and 3 more)`."""
    shown = ", ".join(repr(name) for name in names[:limit])
    more = len(names) - limit
    return f"{shown} (and {more} more)" if more > 0 else shown
