"""Episodes of all kinds: a seed says which."""

from fuzz.calls import divergences
from fuzz.flows import flows
from fuzz.mistakes import mistakes
from fuzz.outcomes import Outcome
from fuzz.scores import operators, scores

__all__ = ["episode"]

_KINDS = [divergences, divergences, divergences, divergences, flows, scores, operators, mistakes]


def episode(seed: int) -> list[Outcome]:
    """Some calls, and what each of them ended in.

    Raises:
        Fault: the first that ended as none may.
    """
    return _KINDS[seed % len(_KINDS)](seed)
