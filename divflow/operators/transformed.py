"""Fields within torch.func's transforms, `grad`, `vjp`, `jacrev`, `jvp` and `vmap`: products with their Jacobian by these.

Within a transform tensors stand for others, whose numbers and graph can't be looked at: autograd does not see them, and nothing
can be verified. So a field is linearized by `torch.func.vjp`, which any other transform may contain, and exact divergences take
dense products.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

from divflow.errors import FieldError

__all__ = ["Transformed", "forward_mode", "refuse_transforms", "transformable", "transformed"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Of make_fx and torch.export, and of tensors without numbers.
_TRACING = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


# Torch's levels of forward mode are one process's, not one thread's (2.13): two threads in it at once get each other's
# derivatives, and a thread that is not in it can't tell that from the level.
_FORWARD_MODE = threading.RLock()
_holders: list[int] = []


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Around forward mode of our own: one thread at a time, which others know of."""
    with _FORWARD_MODE:
        _holders.append(threading.get_ident())
        try:
            yield
        finally:
            _holders.pop()


def transformed() -> bool:
    """Whether a transform of torch.func is under way, or forward mode, or a tracing of operations instead of numbers."""
    return torch._C._functorch.peek_interpreter_stack() is not None or _in_forward_mode() or _traced()


def _in_forward_mode() -> bool:
    holders = _holders[-1:]
    return forward_ad._current_level >= 0 and holders in ([], [threading.get_ident()])


def _traced() -> bool:
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)


def refuse_transforms(what: str, remedy: str, *, only_vmap: bool = False) -> None:
    """Refuse what looks at numbers, which stand for others there, or takes steps that torch.func has no rules for.

    Args:
        what: is not to be transformed.
        remedy: what to do.
        only_vmap: whether the transforms of single samples alone are refused, within which a number can't be looked at.

    Raises:
        FieldError: within a transform.
    """
    if not transformed():
        return
    levels = torch._C._functorch.get_interpreter_stack() or []
    unknown = _traced() or any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)
    if unknown or not only_vmap:
        kind = "torch.vmap or a tracer" if only_vmap else "a transform of torch.func, forward mode or a tracer"
        raise FieldError(f"{what} can't be taken within {kind}; {remedy}")


def transformable(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, with what torch.vmap refuses within it as a `FieldError`, such as random numbers that it was not told of."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not transformed():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if not str(error).startswith("vmap:"):
                raise  # the field's own
            raise FieldError(
                f"a divergence can't be taken within this torch.vmap ({str(error).splitlines()[0]}); take it over the whole batch, "
                "whose samples are kept apart anyway, or draw random numbers by vmap(..., randomness='different')"
            ) from error

    return call


class Transformed:
    """A function's value at a point, and products with its Jacobian there: a `Linearization` within transforms.

    Args:
        function: of the state alone.
        x: the point.
        check: applied to the output and x.

    Attributes:
        value: of the function.
        create_graph: what a `Linearization` says of its products; these can always be transformed further.
    """

    create_graph = True

    def __init__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, check: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        if _traced() and _in_forward_mode():
            from divflow.errors import FieldError

            # Of constants that are written to once they are made it takes what they were before (torch 2.13).
            raise FieldError("torch.func.linearize computes derivatives of fields wrongly; use torch.func.jvp")
        self.value, self._pull = vjp(lambda z: check(function(z.clone()), x), x)[:2]

    def pullback(self, vectors: Tensor, constant: bool = False) -> Tensor:
        """u^T J for every vector u: one by one, since torch's batching rules have faults, and can't be compared here."""
        return torch.stack([self._pull(vector)[0] for vector in vectors])

    def pushforward(self, vectors: Tensor) -> Tensor:
        """J u for every vector u, constants: u^T J^T w, differentiated in w."""
        push = vjp(lambda dual: self._pull(dual)[0], torch.zeros_like(self.value))[1]
        return torch.stack([push(vector)[0] for vector in vectors]).detach()

    def batches(self, count: int, constant: bool = False) -> bool:
        """Whether `count` products are taken in one pass."""
        return False

    def before(self, vectors: Tensor) -> Tensor:
        """The vectors: there is no order of graphs to keep."""
        return vectors
