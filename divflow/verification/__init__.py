"""What every estimator and operator verifies of a user's function, at its calls 1, 2, 4, 8, ...

It verifies that samples are not mixed (`mixing`), and that autograd sees all that the function does (`severed`). In case
of doubt its derivative is compared with central differences (`differences`), on a copy (`copies`).
"""

from divflow.verification.schedule import severed_fields

__all__ = ["severed_fields"]
