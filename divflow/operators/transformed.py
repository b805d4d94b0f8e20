"""Fields inside torch.func's transforms, `grad`, `vjp`, `jacrev`, `jvp` and `vmap`: products with their Jacobian by these.

Inside a transform a tensor stands for others, whose numbers and graph are out of reach: autograd does not see them, and
nothing can be verified. So a field is linearized by `torch.func.vjp`, which any other transform may contain, and exact
divergences take dense products.
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

# The modes of make_fx and torch.export, and of tensors without numbers.
_TRACING = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


# Torch's levels of forward mode belong to the process, not to a thread (2.13): two threads in it at once get each
# other's derivatives, and the level does not show a thread whether it is in it itself.
_FORWARD_MODE = threading.RLock()
_holders: list[int] = []


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Enter forward mode of our own: one thread at a time, visible to the others."""
    with _FORWARD_MODE:
        _holders.append(threading.get_ident())
        try:
            yield
        finally:
            _holders.pop()


def transformed() -> bool:
    """Whether a transform of torch.func, forward mode, or a tracing of operations is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or _in_forward_mode() or _traced()


def _in_forward_mode() -> bool:
    holders = _holders[-1:]
    return forward_ad._current_level >= 0 and holders in ([], [threading.get_ident()])


def _traced() -> bool:
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)


def refuse_transforms(what: str, remedy: str, *, only_vmap: bool = False) -> None:
    """Refuse what reads numbers, which stand for others here, or takes steps for which torch.func has no rules.

    Args:
        what: can't be transformed, for the message.
        remedy: what to do.
        only_vmap: whether to refuse only transforms of single samples, inside which no number can be read.

    Raises:
        FieldError: inside a transform.
    """
    if not transformed():
        return
    levels = torch._C._functorch.get_interpreter_stack() or []
    unknown = _traced() or any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)
    if unknown or not only_vmap:
        kind = "torch.vmap or a tracer" if only_vmap else "a transform of torch.func, forward mode or a tracer"
        raise FieldError(f"{what} can't be taken within {kind}: {remedy}")


def transformable(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap a function: what torch.vmap refuses inside it, such as undeclared random numbers, becomes a `FieldError`.

    Args:
        function: the one to wrap.
    """

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
                f"a divergence can't be taken within this torch.vmap ({str(error).splitlines()[0]}). Take it over the whole batch, "
                "which keeps samples apart anyway, or draw random numbers by vmap(..., randomness='different')."
            ) from error

    return call


class Transformed:
    """A function's value at a point, and products with its Jacobian there: a `Linearization` inside transforms.

    Args:
        function: of the state alone.
        x: the point.
        check: called with the output and x.

    Attributes:
        value: of the function.
        create_graph: as of `Linearization`; these products can always be transformed further.
    """

    create_graph = True

    def __init__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, check: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        if _traced() and _in_forward_mode():
            from divflow.errors import FieldError

            # It uses constants as they were before they were written to (torch 2.13).
            raise FieldError("torch.func.linearize computes wrong derivatives of fields. Use torch.func.jvp.")
        self.value, self._pull = vjp(lambda z: check(function(z.clone()), x), x)[:2]

    def pullback(self, vectors: Tensor, constant: bool = False) -> Tensor:
        """Return u^T J for every vector u: one by one, because torch's batching rules have faults that can't be found here."""
        return torch.stack([self._pull(vector)[0] for vector in vectors])

    def pushforward(self, vectors: Tensor) -> Tensor:
        """Return J u for every vector u, constants: u^T J^T w, differentiated in w."""
        push = vjp(lambda dual: self._pull(dual)[0], torch.zeros_like(self.value))[1]
        return torch.stack([push(vector)[0] for vector in vectors]).detach()

    def batches(self, count: int, constant: bool = False) -> bool:
        """Whether one pass takes `count` products."""
        return False

    def before(self, vectors: Tensor) -> Tensor:
        """Return the vectors: there is no order of graphs to keep."""
        return vectors
