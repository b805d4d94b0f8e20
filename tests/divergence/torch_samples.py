"""torch's own sample inputs of its operations as functions of one vector, and their derivatives by products and differences."""

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

from divflow.operators.linearization import linearize

# They draw random numbers, round to a lower precision, or need what this build lacks.
_LEFT_OUT = """
dropout rrelu bernoulli normal rand multinomial jiterator sparse new_empty empty uniform cauchy log_normal exponential
geometric bfloat16 half float16
""".split()  # noqa: SIM905
# Their other tensors are targets, which they compare with 1 and -1.
_OF_THE_FIRST_ALONE = {"nn.functional.cosine_embedding_loss", "nn.functional.hinge_embedding_loss"}
OPERATIONS = [
    op
    for op in op_db
    if op.supports_autograd and torch.float64 in op.dtypes and not any(word in op.name for word in _LEFT_OUT)
]

Function = Callable[[Tensor], Tensor]


def name_of(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def samples(op: Any) -> Iterator[Any]:
    """torch's own sample inputs of an operation, each with random numbers of one seed.

    Those of `op.sample_inputs`, which takes twice as long: it looks through the stack for the test that asked.
    """
    made = iter(op.sample_inputs_func(op, "cpu", torch.float64, requires_grad=False))
    while True:
        torch.default_generator.manual_seed(1234)
        random.seed(1234)
        np.random.seed(1234)  # noqa: NPY002 - they draw from it
        try:
            sample = next(made)
        except StopIteration:
            return
        yield sample


def functions(op: Any, most: int, symmetric: bool = True) -> Iterator[tuple[Function, Tensor]]:
    """An operation as a function of all floating tensors among its arguments, `(1, n)` to `(1, m)`, and where to take it.

    Where it is not differentiable in all of them (running statistics, targets), it is one of the first alone.

    Args:
        op: of torch's operation database.
        most: samples of it.
        symmetric: whether matrices are made symmetric first where its derivative is that for symmetric ones.
    """
    found = 0
    for sample in samples(op):
        if found == most:
            return
        for only_first in [True] if op.name in _OF_THE_FIRST_ALONE else [False, True]:
            function, x = _of_sample(op, sample, only_first, symmetric)
            if not 0 < x.numel() <= 450:
                continue
            try:
                point = x.clone().requires_grad_()
                value = function(point)
                torch.autograd.grad(value.sum(), point, allow_unused=True)
                value = function(x)
            except Exception:
                continue
            if value.numel() and value.isfinite().all():
                found += 1
                yield function, x
            break


def _of_sample(op: Any, sample: Any, only_first: bool, symmetric: bool = True) -> tuple[Function, Tensor]:
    leaves, structure = tree_flatten((sample.input, sample.args, sample.kwargs))
    chosen = [
        isinstance(leaf, Tensor) and leaf.dtype == torch.float64 and leaf.layout == torch.strided for leaf in leaves
    ]
    if only_first:
        chosen = [it and not any(chosen[:place]) for place, it in enumerate(chosen)]
    varied = [leaf.detach() for leaf, it in zip(leaves, chosen, strict=True) if it]
    sizes = [leaf.numel() for leaf in varied]

    def function(z: Tensor) -> Tensor:
        parts = iter(z[0].split(sizes))
        new = [
            next(parts).view(leaf.shape).clone()
            if it
            else leaf.clone()
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided
            else leaf
            for leaf, it in zip(leaves, chosen, strict=True)
        ]
        input, args, kwargs = tree_unflatten(new, structure)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Some are differentiable as functions of symmetric or triangular matrices alone, which this makes.
            made = op.gradcheck_wrapper if symmetric else lambda f, *args, **kwargs: f(*args, **kwargs)
            result = made(op.get_op(), input, *args, **kwargs)
        outputs, _ = tree_flatten(sample.output_process_fn_grad(result))
        floating = [o.double().reshape(1, -1) for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]
        return torch.cat(floating or [z[:, :0]], dim=1)

    flat = [leaf.reshape(1, -1) for leaf in varied]
    return function, torch.cat(flat, dim=1) if flat else torch.zeros(1, 0)


def product(function: Function, order: int) -> Function:
    """The gradient of u^T f, of u^T times that, and so on, for a random vector u at each order."""
    for _ in range(order):

        def derivative(z: Tensor, lower: Function = function) -> Tensor:
            at = linearize(lower, z, lambda value, _: value, watched=False)
            return at.pullback(_random(at.value, 0)[None])[0]

        function = derivative
    return function


def _random(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Steps, of which two must agree before a derivative is called wrong.
_STEPS = (1e-4, 3e-5, 1e-5)


def verdict(function: Function, x: Tensor, order: int) -> str:
    """Whether a derivative of an order is "right", "wrong", "refused" (with what is said) or "unknown"."""
    direction = _random(x, 1)
    lower = product(function, order - 1)

    def along(h: float) -> float:
        value = lower(x + h * direction).detach()
        return float((value * _random(value, 0)).sum())

    try:
        found = float((product(function, order)(x) * direction).sum())
    except Exception as error:
        return f"refused: {error}".splitlines()[0][:90]
    size = abs(along(0.0))
    differences = [(along(h) - along(-h)) / (2 * h) for h in _STEPS]
    scale = max(abs(differences[-1]), size, 1e-3)
    if any(abs(found - difference) <= 1e-3 * scale for difference in differences):
        return "right"
    if not all(abs(difference - differences[-1]) <= 1e-3 * scale for difference in differences):
        return "unknown"
    return "not finite" if found != found or abs(found) == float("inf") else "wrong"
