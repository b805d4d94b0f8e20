"""What is verified of a user's function, at calls 1, 2, 4, 8, ..., by every estimator and operator.

That its samples are not mixed (`mixing`), and that autograd knows all that it does (`severed`); where that is in doubt, its
derivative is compared with central differences (`differences`), on a copy (`copies`).
"""

from divflow.verification.schedule import severed_fields

__all__ = ["severed_fields"]
