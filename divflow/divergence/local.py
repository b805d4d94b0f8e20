"""Local fields, with normalizations between or without: their colouring, what is verified of it, and the divergence."""

from typing import NamedTuple

from torch import Tensor

from divflow.divergence import colored, normalized
from divflow.divergence.colored import Coloring, NotLocal
from divflow.divergence.field import Field, Linearization
from divflow.divergence.layered import Followed
from divflow.divergence.layered.decompositions import NORMALIZATIONS
from divflow.divergence.normalized import Held
from divflow.verification.kept import Plans

__all__ = ["Local", "NotLocal", "choose", "evaluate"]

# By field, event shape and structure, whatever the batch.
_COLORINGS: Plans[Coloring] = Plans(size=8)


class Local(NamedTuple):
    """A local field, evaluated.

    Attributes:
        coloring: of its event.
        field: as it was evaluated.
        held: evaluated with the statistics of its normalizations held, if it is local only then.
    """

    coloring: Coloring
    field: Linearization
    held: Held | None

    @property
    def products(self) -> int:
        """Products with the Jacobian that the divergence takes."""
        return len(self.coloring.colors) + 2 * self.coloring.statistics

    @property
    def why(self) -> str:
        """What is gained, in numbers."""
        why = f"{len(self.coloring.colors)} colours for {self.coloring.seen.shape[0]} dimensions"
        if self.held is None:
            return why
        count = self.held.normalizations
        return f"{why}, and {self.held.total} statistics of {count} normalization{'s' if count > 1 else ''}"

    def divergence(self, x: Tensor, chunk_size: int, recompute: bool) -> Tensor:
        """The divergence, `(k,)`."""
        if self.held is not None:
            return normalized.trace(self.held, x, self.coloring.colors, chunk_size, recompute)
        return colored.trace(self.field, x, self.coloring.colors, chunk_size, recompute)


def evaluate(
    g: Field, t: Tensor, x: Tensor, followed: Followed, coloring: Coloring, states: list[Tensor], verify: bool
) -> Local:
    """What the divergence by a colouring is taken from, which is verified if told to.

    Raises:
        NotLocal: the field is not what was coloured.
    """
    held = normalized.hold(g, t, x, states, verify) if coloring.statistics else None
    if held is not None and held.total != coloring.statistics:
        raise NotLocal("it has other statistics than before")
    if verify and held is not None:
        normalized.check(held, followed.field, x)
    if verify:
        colored.check(followed.field if held is None else held.local, x, coloring.seen)
    return Local(coloring, followed.field, held)


def choose(g: Field, t: Tensor, x: Tensor, followed: Followed, states: list[Tensor]) -> Local:
    """Colour a field, or find how it was coloured before.

    Args:
        g: the field.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        followed: the field's evaluation.
        states: of the random generators, before it was evaluated.

    Raises:
        NotLocal: it can't be coloured.
    """
    if followed.hides() or not followed.trace.depends(followed.output):
        raise NotLocal("a part of it is hidden from torch functions")
    if followed.trace.choices:
        raise NotLocal(f"{followed.trace.choices[0]} may choose what is seen")
    key = x.shape[1:], x.dtype, x.device, followed.structure
    coloring = _COLORINGS.get(g, *key)
    if coloring is not None:
        try:
            return evaluate(g, t, x, followed, coloring, states, verify=True)
        except NotLocal:
            pass  # it was another field: find its own
    local = _found(g, t, x, followed, states)
    _COLORINGS.keep(local.coloring, g, *key)
    return local


def _found(g: Field, t: Tensor, x: Tensor, followed: Followed, states: list[Tensor]) -> Local:
    try:
        return Local(colored.find(g, t, x, followed.field), followed.field, None)
    except NotLocal:
        if NORMALIZATIONS.keys().isdisjoint(name for name, *_ in followed.trace.signature):
            raise
    held = normalized.hold(g, t, x, states, verify=True)
    normalized.check(held, followed.field, x)
    try:
        coloring = colored.find(held.field, t, x, held.local)._replace(statistics=held.total)
    except NotLocal as error:
        raise NotLocal(f"with its normalizations' statistics held, {error}") from error
    return Local(coloring, followed.field, held)
