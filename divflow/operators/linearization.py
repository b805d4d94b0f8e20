"""A function of the state at one point: its checked value, and products with its Jacobian.

Everything that differentiates a field goes through `linearize`, so that one place handles grad modes, autocast,
compiled networks and the caller's tensors, which must stay as they are.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from divflow.errors import FieldError
from divflow.operators.batching import batches
from divflow.operators.compiled import eagerly
from divflow.operators.field import AtTime, Field, as_time, checked_state, checked_value
from divflow.operators.third_derivatives import Normalizations
from divflow.operators.transformed import Transformed, transformed
from divflow.tape.graph import graph_of
from divflow.verification.products import reentrant_refused
from divflow.verification.watch import Watch, watch

__all__ = ["Linearization", "linearize", "linearize_field"]


class Linearization:
    """A field's value at a point, and vector-Jacobian products there, from one evaluation.

    Attributes:
        value: g(t, x), `(k, *event)`, with its graph where grad is enabled.
        create_graph: whether the value and the products keep theirs.
    """

    def __init__(self, output: Tensor, point: Tensor, create_graph: bool) -> None:
        self._output, self._point, self.create_graph = output, point, create_graph
        self._batches: dict[tuple[int, bool], bool] = {}
        self._normalizations: Normalizations | None = None
        self.value = output if create_graph else output.detach()

    def pullback(
        self, vectors: Float[Tensor, "products batch *out"], constant: bool = False
    ) -> Float[Tensor, "products batch *event"]:
        """Return u^T J for every vector u: in one pass if torch's batched products are right, or one pass each.

        Products requested as a `constant` have no graph.
        """
        if not self._output.requires_grad or self._output.numel() == 0:
            return vectors.new_zeros(vectors.shape[0], *self._point.shape)
        if self.batches(len(vectors), constant):
            try:
                return self._grad(vectors, True, constant)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a batching rule that took another memory layout; errors of the field recur below
                self._batches[len(vectors), self.create_graph and not constant] = False
        return torch.stack([self._grad(vector, False, constant) for vector in vectors])

    def pushforward(self, vectors: Float[Tensor, "products batch *event"]) -> Float[Tensor, "products batch *out"]:
        """Return J u for every vector u, constants: u^T J^T w is linear in w and is differentiated in it (linearized `twice`).

        Raises:
            FieldError: an operation without second derivatives.
        """
        if not self._output.requires_grad or self._output.numel() == 0:
            return vectors.new_zeros(vectors.shape[0], *self._output.shape)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return self._columns(vectors).detach()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise FieldError(
                f"the field has an operation without second derivatives, which these products need ({str(error).splitlines()[0]}). "
                "Use an estimator of vector-Jacobian products alone, such as Hutchinson()."
            ) from error

    def _columns(self, vectors: Tensor) -> Tensor:
        dual = torch.zeros_like(self._output, requires_grad=True)
        (product,) = torch.autograd.grad(self._output, self._point, dual, create_graph=True, materialize_grads=True)
        if not product.requires_grad:  # x is detached within the field
            return vectors.new_zeros(vectors.shape[0], *self._output.shape)
        columns = [
            torch.autograd.grad(product, dual, vector, retain_graph=True, allow_unused=True)[0] for vector in vectors
        ]
        if any(column is None for column in columns):
            raise RuntimeError("an operation's backward pass is hidden from autograd")
        return torch.stack(columns)

    def batches(self, count: int, constant: bool = False) -> bool:
        """Whether one pass takes `count` products: tested once, then fixed for this evaluation."""
        if count < 2 or not self._output.requires_grad or self._output.numel() == 0:
            return False
        graph = self.create_graph and not constant
        if (count, graph) not in self._batches:

            def product(vectors: Tensor, batched: bool) -> Tensor:
                return self._grad(vectors, batched, not graph)

            self._batches[count, graph] = batches(product, self._output, self._point, count, graph)
        return self._batches[count, graph]

    def before(self, vectors: Tensor) -> Tensor:
        """Return the vectors, for products that a backward pass is going to compute again.

        Their backward pass comes before that of the evaluation, which frees what they need. Without this the order would be
        that of the autograd engine, which differs with one queue per device.
        """
        return _Before.apply(vectors, self._output) if self.create_graph else vectors

    def _grad(self, vectors: Tensor, batched: bool, constant: bool) -> Tensor:
        create_graph = self.create_graph and not constant
        if create_graph and self._normalizations is None:
            self._normalizations = Normalizations(self._output, self._point)
        with torch.inference_mode(False), torch.set_grad_enabled(create_graph), reentrant_refused():
            (product,) = torch.autograd.grad(
                self._output,
                self._point,
                vectors,
                create_graph=create_graph,
                retain_graph=True,
                is_grads_batched=batched,
                allow_unused=True,
            )
        if product is None:  # materialize_grads would do this, but loses the batch of vectors
            return vectors.new_zeros((*vectors.shape[:batched], *self._point.shape))
        return self._normalizations.correct(product, batched) if create_graph and self._normalizations else product


class _Before(torch.autograd.Function):
    """Vectors as they are, with an edge to an evaluation's graph that carries no gradient."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, output: Tensor) -> Tensor:
        return vectors.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Eagerly:
    """A context in which functions made by torch.compile run eagerly, in all threads, while any thread is in it.

    Torch's stance belongs to the process: two threads that set and reset it in turn would leave it set for ever.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._stance: contextlib.AbstractContextManager | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)


_EAGERLY = _Eagerly()


@contextlib.contextmanager
def _differentiable_kernels(twice: bool) -> Iterator[None]:
    """Use kernels whose graph can be kept for several products, and differentiated twice.

    Networks made by torch.compile can do neither, so they run eagerly here; fused attention kernels have no second
    derivatives.
    """
    with contextlib.ExitStack() as stack:
        if not torch.compiler.is_compiling():
            # If nothing was compiled, torch's compiler is not loaded, and need not be.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(_EAGERLY)
            if twice:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@eagerly
def linearize(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    check: Callable[[Tensor, Tensor], Tensor],
    products: bool = True,
    twice: bool = False,
    watched: Watch | bool = True,
) -> Linearization:
    """Evaluate `function` once at x, ready for products with its Jacobian; calls 1, 2, 4, 8, ... are verified.

    Args:
        function: of the state alone; a field with its time bound.
        x: the point, `(k, *event)`; unchanged, even if the function works in place.
        check: called with the output and x; returns the output or raises `FieldError`.
        products: whether products will be taken; without them, only the graphs that the caller wants are built.
        twice: whether products will be differentiated even if grad is not enabled (`Linearization.pushforward`).
        watched: the watcher of the evaluation, if it was started outside; False if this is not a user's function.

    Raises:
        FieldError: the user's function violates what the mathematics needs (`divflow.verification`).
    """
    if transformed():
        with _differentiable_kernels(twice=True):
            return cast(Linearization, Transformed(function, x, check))
    differentiable = torch.is_grad_enabled()
    watcher = watch(function, x) if watched is True else watched or None
    if watcher is not None:
        products, function = True, watcher if watched is True else function
    with torch.inference_mode(False), torch.enable_grad():
        # An inference tensor can't enter a graph. A view of x keeps its history; the copy given to the
        # function keeps in-place code from x and from the point that is differentiated.
        x = x.clone() if x.is_inference() else x
        attached = differentiable and x.requires_grad
        point = x.view_as(x) if attached else x.detach().requires_grad_(products)
        try:
            with _differentiable_kernels(twice=twice or differentiable):
                output = check(function(point.clone()), x)
        except RuntimeError as error:
            if "Inference tensors cannot be saved for backward" not in str(error):
                raise
            raise FieldError(
                "the field uses a tensor made under torch.inference_mode, which torch can't differentiate. Clone it outside of "
                "inference mode, or evaluate under torch.no_grad instead."
            ) from error
    if watcher is not None:
        watcher.conclude(output, point, twice or differentiable)
    # If no tensor of the caller's (a parameter, t, a captured one) would receive a gradient, no graph is kept, and
    # results can be used like any plain tensor.
    leaves = (getattr(node, "variable", point) is not point for node in graph_of(output))
    return Linearization(output, point, attached or (differentiable and any(leaves)))


def linearize_field(
    g: Field,
    t: Tensor | float,
    x: Tensor,
    products: bool = True,
    twice: bool = False,
    watched: Watch | bool = True,
) -> Linearization:
    """Linearize a field at time t, with t, x and the value checked.

    Args:
        g: the field.
        t: time, a scalar or `(k,)`.
        x: states `(k, *event)`.
        products: as of `linearize`.
        twice: as of `linearize`.
        watched: as of `linearize`.
    """
    x = checked_state(x)
    return linearize(AtTime(g, as_time(t, x)), x, checked_value, products, twice, watched)
