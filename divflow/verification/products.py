"""Products with a field's Jacobian, whose errors are explained."""

import contextlib
from collections.abc import Iterator

from divflow.errors import FieldError

__all__ = ["reentrant_refused"]


@contextlib.contextmanager
def reentrant_refused() -> Iterator[None]:
    """Wrap products with a field's Jacobian.

    Raises:
        FieldError: instead of torch's error, which describes another use.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise FieldError(
            "the field is checkpointed by torch.utils.checkpoint with use_reentrant=True, which does not support products with its "
            "Jacobian. Set use_reentrant=False (gradient_checkpointing_kwargs of transformers)."
        ) from error
