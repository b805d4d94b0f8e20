"""Fields within torch.func's transforms, `grad`, `vjp`, `jacrev`, `jvp` and `vmap`: products with their Jacobian by these.

Within a transform tensors stand for others, whose numbers and graph can't be looked at: autograd does not see them, and nothing
can be verified. So a field is linearized by `torch.func.vjp`, which any other transform may contain, and exact divergences take
dense products.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp, vmap

from divflow.errors import DivflowError

__all__ = ["TransformError", "Transformed", "refuse_transforms", "transformed"]


class TransformError(DivflowError, RuntimeError):
    """What can't be done within a transform of torch.func."""


def transformed() -> bool:
    """Whether a transform of torch.func is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms(what: str, remedy: str, *, only_vmap: bool = False) -> None:
    """Refuse what looks at numbers.

    Args:
        what: is not to be transformed.
        remedy: what to do.
        only_vmap: whether the transforms of single samples alone are refused, under which no number is known.

    Raises:
        TransformError: within a transform.
    """
    if not transformed():
        return
    levels = torch._C._functorch.get_interpreter_stack() or []
    if not only_vmap or any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels):
        kind = "torch.vmap" if only_vmap else "a transform of torch.func"
        raise TransformError(f"{what} can't be taken within {kind}, where no number is known; {remedy}")


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
        self.value, self._pull = vjp(lambda z: check(function(z.clone()), x), x)

    def pullback(self, vectors: Tensor, constant: bool = False) -> Tensor:
        """u^T J for every vector u."""
        return vmap(lambda vector: self._pull(vector)[0])(vectors) if len(vectors) else self._none(vectors)

    def pushforward(self, vectors: Tensor) -> Tensor:
        """J u for every vector u, constants: u^T J^T w, differentiated in w."""
        _, push = vjp(lambda dual: self._pull(dual)[0], torch.zeros_like(self.value))
        return vmap(lambda vector: push(vector)[0])(vectors).detach()

    def batches(self, count: int, constant: bool = False) -> bool:
        """Whether `count` products are taken in one pass."""
        return count > 1

    def before(self, vectors: Tensor) -> Tensor:
        """The vectors: there is no order of graphs to keep."""
        return vectors

    def _none(self, vectors: Tensor) -> Tensor:
        (product,) = self._pull(torch.zeros_like(self.value))
        return product[None][:0]
