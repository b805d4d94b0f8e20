"""Value, gradient and Laplacian within torch.func's transforms, by these themselves."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from divflow.operators import dense
from divflow.operators.field import event_size
from divflow.operators.linearization import Linearization
from divflow.operators.transformed import Transformed

__all__ = ["by_transforms"]


def by_transforms(
    f: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor, check: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """f(t, x), its gradient, and D products with the Jacobian of that, which other transforms may contain.

    Args:
        f: called as f(t, x), returns `(k,)`; evaluated more than once, since autograd keeps nothing here.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        check: of f's value and x.
    """
    value = check(f(t.clone(), x.clone()), x)
    if value.is_complex():
        real, imaginary = (
            by_transforms(lambda t, z, part=part: getattr(f(t, z), part), t, x, check)  # type: ignore[misc]
            for part in ("real", "imag")
        )
        return (
            torch.complex(real[0], imaginary[0]),
            torch.complex(real[1], imaginary[1]),
            torch.complex(real[2], imaginary[2]),
        )

    def slope(z: Tensor) -> Tensor:
        return Transformed(lambda y: f(t.clone(), y), z, check).pullback(z.new_ones(1, len(z)))[0]

    at = cast(Linearization, Transformed(slope, x, lambda gradient, _: gradient))
    chunk = min(dense.products_per_pass(x), max(1, event_size(x)))
    return value, at.value, dense.reverse(at, x, chunk, recompute=False)
