"""The common root of divflow's own errors, so that one `except` can tell them from a bug."""

__all__ = ["DivflowError"]


class DivflowError(Exception):
    """Something a user can mend: the message names the value received and the remedy."""
