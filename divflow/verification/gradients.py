"""Check the gradient that a training step would take, by central differences before the first step.

Second derivatives can be silently wrong in autograd: a custom `autograd.Function` that keeps an intermediate result
without its graph has a right divergence, and a wrong gradient of it. So the derivatives of the value and of the
divergence along one random direction of all parameters and of the state are computed both ways, on a copy in double
precision.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

from divflow.errors import FieldError, FieldWarning
from divflow.tape.graph import graph_of
from divflow.verification.copies import copied
from divflow.verification.schedule import answer, verifying
from divflow.verification.seeded import seeded

__all__ = ["check_gradient"]

Field = Callable[[Tensor, Tensor], Tensor]

_ROWS = 2
# Steps in units of each tensor: few such close points have a kink between them, and none has one for all steps.
_STEPS = {torch.float64: (1e-5, 1e-6, 1e-4, 1e-7), torch.float32: (3e-3, 1e-2, 3e-2)}
# Fractions of a derivative that count as agreement, and by which fraction of the error the differences may differ.
_AGREES, _CONSISTENT = {torch.float64: 1e-4, torch.float32: 0.3}, 0.1
# How far the point is moved away from zero, where kinks often lie, and parameters away from zero, which hides their factors.
_MOVED, _FROM_ZERO = 1e-3, 0.1


class Estimator(Protocol):
    """A way to the divergence, as `divflow.divergence.Estimator` is one."""

    frozen: bool

    def __call__(self, g: Field, t: Tensor, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the value `(k, *event)` and the divergence `(k,)`."""

    def freeze(self, x: Tensor, generator: Generator | None = None) -> "Estimator":
        """Return the estimator with its random vectors drawn."""


def check_gradient(g: Field, t: Tensor | float, x: Tensor, estimator: Estimator) -> None:
    """Refuse a field if autograd and central differences disagree on its gradient, or on that of its divergence.

    It is evaluated at two samples about six times, with the same random numbers each time. If it can't be copied to double
    precision, differences prove little, and a wrong gradient only raises a warning. Fields that return another value at
    each evaluation, whose derivatives autograd refuses, or that detach on purpose (`severed_fields("allow")`) are not
    compared.

    Args:
        g: the field.
        t: time, a scalar or `(k,)`.
        x: states `(k, *event)` such as the field will receive.
        estimator: of the divergence; it is frozen first.

    Raises:
        FieldError: the gradients differ; the message has both numbers.
    """
    if x.numel() == 0 or answer() == "allow" or torch.compiler.is_compiling():
        return
    x, t = x.detach(), torch.as_tensor(t, device=x.device).detach()
    with verifying(), torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        for field, time, states in _at_few_samples(g, t, x, estimator):
            for dtype in (torch.float64, torch.float32):
                try:
                    own, way = copied((field, estimator), dtype == torch.float64).field
                    miss = _Point(own, way, time, states.to(dtype)).compare()
                except torch.OutOfMemoryError:
                    return
                except Exception:  # it can't be copied, computes in one precision only, or has no second derivatives
                    continue
                if miss is not None:
                    _report(miss, certain=dtype == torch.float64)
                return


def _at_few_samples(g: Field, t: Tensor, x: Tensor, estimator: Estimator) -> Iterator[tuple[Field, Tensor, Tensor]]:
    """The field, times and states: of two samples, or of all if it holds something for each of them."""
    rows = [*range(min(_ROWS, len(x)))]
    of_rows = getattr(g, "divflow_rows", None)
    if not estimator.frozen:  # a frozen one needs as many samples
        yield g if of_rows is None else of_rows(rows), t[rows] if t.ndim else t, x[rows]
    if estimator.frozen or (of_rows is None and len(x) > _ROWS):
        yield g, t, x


class _Miss(NamedTuple):
    """A derivative by autograd, and the one by differences."""

    of: str
    autograd: float
    difference: float
    functions: list[str]


def _report(miss: _Miss, certain: bool) -> None:
    by = f"It calls {', '.join(miss.functions)}. " if miss.functions else ""
    message = (
        f"the gradient of {miss.of} is wrong: its derivative along a random direction of the parameters and of x is "
        f"{miss.difference:.6g} by central differences, and {miss.autograd:.6g} by autograd. {by}A custom autograd.Function "
        "must save only inputs and outputs, by ctx.save_for_backward, and compute the rest of its backward pass from these; "
        "some of torch's own operations have wrong derivatives, too (see 'Derivatives that torch has wrong' in the "
        "documentation). For a field that detaches on purpose, use severed_fields('allow')."
    )
    if certain and answer() == "refuse":
        raise FieldError(message)
    warnings.warn(message, FieldWarning, stacklevel=3)


class _Point:
    """A copy of a field at a point, and the tensors to vary there.

    Args:
        g: the copy.
        estimator: of its divergence.
        t: time.
        x: states.
    """

    def __init__(self, g: Field, estimator: Estimator, t: Tensor, x: Tensor) -> None:
        self._g, self._t = g, t.to(x.dtype) if t.is_floating_point() else t
        self._noise = Generator("cpu").manual_seed(0)
        self._x = (x + _MOVED * self._random(x)).requires_grad_()
        self._estimator = estimator.freeze(self._x, Generator(x.device).manual_seed(0))

    def compare(self) -> _Miss | None:
        """Compute the derivatives of the value and of the divergence along one direction both ways; return what is wrong, or None.

        Raises:
            Exception: they can't be compared.
        """
        inputs = [self._x, *self._parameters()]
        before = [z.detach().clone() for z in inputs]
        try:
            with torch.no_grad():
                for z in inputs[1:]:
                    z += (_MOVED if z.any() else _FROM_ZERO) * self._random(z)
            return self._compared(inputs, [self._random(z) for z in inputs])
        finally:
            with torch.no_grad():  # in case one is not a copy
                for z, own in zip(inputs, before, strict=True):
                    z.copy_(own)

    def _compared(self, inputs: list[Tensor], directions: list[Tensor]) -> _Miss | None:
        outputs, again = self._evaluate(), self._evaluate()
        weights = [
            torch.randn(o.shape, generator=self._noise, dtype=torch.float64, device="cpu").to(o) for o in outputs
        ]
        if not all(_equal(a, b) for a, b in zip(outputs, again, strict=True)):
            return None  # it keeps a state
        known = [_along(o, w, inputs, directions) for o, w in zip(outputs, weights, strict=True)]
        functions = sorted({kind.removesuffix("Backward") for kind in _custom(*outputs)})
        rounding = [float((o * w).detach().abs().sum()) for o, w in zip(outputs, weights, strict=True)]
        verdicts = [_Verdict(k, r, self._x.dtype) for k, r in zip(known, rounding, strict=True)]
        for h in _STEPS[self._x.dtype]:
            sums: list[list[float]] = []
            for step in (h, -2 * h, h):  # there, back, and to where it was
                with torch.no_grad():
                    for z, direction in zip(inputs, directions, strict=True):
                        z += step * direction
                if len(sums) < 2:
                    values = self._evaluate()
                    sums.append([float((v * w).detach().sum()) for v, w in zip(values, weights, strict=True)])
            for verdict, plus, minus in zip(verdicts, *sums, strict=True):
                verdict.add((plus - minus) / (2 * h), h)
            if not any(verdict.open for verdict in verdicts):
                break
        for of, verdict in zip(("the field's value", "its divergence"), verdicts, strict=True):
            if verdict.wrong is not None:
                return _Miss(of, verdict.known, verdict.wrong, functions)
        return None

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """Evaluate value and divergence, with the same random numbers each time."""
        with seeded(0, [self._x.device] if self._x.is_cuda else []):
            generator = Generator(self._x.device).manual_seed(0)
            value, divergence = self._estimator(self._g, self._t, self._x, generator)
        if value.dtype != self._x.dtype:
            raise TypeError("it computes in another precision")
        return value, divergence

    def _parameters(self) -> list[Tensor]:
        """What value and divergence depend on: all leaves of their graphs, and the module's parameters."""
        leaves = [getattr(node, "variable", None) for node in graph_of(*self._evaluate())]
        leaves += self._g.parameters() if isinstance(self._g, nn.Module) else []
        unique = {id(leaf): leaf for leaf in leaves if leaf is not None and leaf is not self._x}
        return [z for z in unique.values() if z.requires_grad and z.numel() and z.dtype == self._x.dtype]

    def _random(self, z: Tensor) -> Tensor:
        """A random direction of the size of a tensor's entries; of size one for zeros."""
        size = z.detach().square().mean().sqrt()
        noise = torch.randn(z.shape, generator=self._noise, dtype=torch.float64, device="cpu").to(z)
        return torch.where((size > 0) & size.isfinite(), size, torch.ones_like(size)) * noise


class _Verdict:
    """Compare a derivative by autograd with differences: it is wrong if two of these agree with each other and none with it.

    Attributes:
        known: by autograd.
        wrong: the value by differences, if it differs.
        open: whether more differences are needed.
    """

    def __init__(self, known: float, rounding: float, dtype: torch.dtype) -> None:
        self.known, self.open = known, True
        self.wrong: float | None = None
        self._agrees, self._eps = _AGREES[dtype], torch.finfo(dtype).eps * rounding
        self._found: list[float] = []

    def add(self, difference: float, h: float) -> None:
        """Add one difference."""
        miss = abs(difference - self.known)
        if not self.open or not math.isfinite(miss):
            return
        if miss <= self._agrees * (abs(difference) + abs(self.known)) + 64 * self._eps / h:
            self.wrong, self.open = None, False
        elif self.wrong is None and any(abs(difference - other) <= _CONSISTENT * miss for other in self._found):
            self.wrong = difference
        self._found.append(difference)


def _along(output: Tensor, weight: Tensor, inputs: list[Tensor], directions: list[Tensor]) -> float:
    if not output.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(output, inputs, weight, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, directions, strict=True)
    return float(sum((gradient * direction).sum() for gradient, direction in pairs if gradient is not None))


def _equal(a: Tensor, b: Tensor) -> bool:
    scale = a.detach().abs().amax()
    return bool(scale.isfinite()) and not bool(((a - b).abs() > 64 * torch.finfo(a.dtype).eps * scale).any())


def _custom(*outputs: Tensor) -> list[str]:
    """The custom autograd.Functions that led to some tensors."""
    kinds = {type(node) for node in graph_of(*outputs)}
    return [kind.__name__ for kind in kinds if issubclass(kind, torch.autograd.function.BackwardCFunction)]
