"""The common root of divflow's own errors, so that one `except` can tell them from a bug."""

__all__ = ["DivflowError", "FieldError", "FieldWarning"]


class DivflowError(Exception):
    """Something a user can mend: the message names the value received and the remedy."""


class FieldError(DivflowError, ValueError):
    """A field or its arguments are not what the mathematics needs."""


class FieldWarning(UserWarning):
    """A field may not be what the mathematics needs: what was seen of it, and what to do."""
