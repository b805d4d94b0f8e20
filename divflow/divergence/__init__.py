"""The divergence (trace of the Jacobian) of a tensor-valued field g(t, x), exactly or by estimation.

    (div g)(t, x)_b = sum_i d g_i / d x_i      for sample b, over all event dimensions.

Needs torch alone: import it into any training code of your own.
"""

from collections.abc import Callable

from torch import Tensor

from divflow.divergence.autograd import Autograd
from divflow.divergence.check import check_field
from divflow.divergence.control_variate import ControlVariate
from divflow.divergence.estimator import Estimate, Estimator, ValueAndDivergence
from divflow.divergence.exact import Exact
from divflow.divergence.exact.conditioned import given
from divflow.divergence.exact.layered.contract import shared_products
from divflow.divergence.hutchinson import Hutchinson
from divflow.divergence.sketched import HutchPlusPlus, XTrace
from divflow.errors import FieldError, FieldWarning
from divflow.operators.context import Context
from divflow.operators.field import Field
from divflow.operators.plan import Plan
from divflow.verification import severed_fields

__all__ = [
    "Autograd",
    "ControlVariate",
    "Estimate",
    "Estimator",
    "Exact",
    "Field",
    "FieldError",
    "FieldWarning",
    "HutchPlusPlus",
    "Hutchinson",
    "Plan",
    "ValueAndDivergence",
    "XTrace",
    "check_field",
    "divergence",
    "shared_products",
    "value_and_divergence",
]

_EXACT = Exact()


def value_and_divergence(
    g: Callable[..., Tensor],
    t: Tensor | float,
    x: Tensor,
    estimator: Estimator = _EXACT,
    *,
    detached: bool = False,
    context: Context | None = None,
) -> ValueAndDivergence:
    """The value g(t, x) and its divergence, from one evaluation of the field.

    Args:
        g: the field; called as `g(t, x)`, or `g(t, x, context)` where there is a context, returns a tensor of x's shape, dtype
            and device, and treats the samples of a batch independently (`check_field` tells).
        t: time, a scalar or one a sample `(k,)`.
        x: states `(k, *event)`, of a floating dtype; an event is a vector, an image, any tensor.
        estimator: `Exact()`, `Autograd()`, `Hutchinson()` or one of your own.
        detached: whether the field means what it hides from autograd (`detach`, `no_grad`, numpy), which gets a warning
            otherwise, since the divergence leaves it out.
        context: conditions that change from call to call, a tensor or any tree of tensors (dict, tuple, list) of any dtype; g
            gets a copy. What was planned for g serves for other numbers in it, where a closure over them, `lambda t, x: net(t,
            x, c)`, is planned anew with each c. It may require grad, and need not be of one row a sample.

    Returns:
        `ValueAndDivergence(value, divergence)` of shapes `(k, *event)` and `(k,)`. The divergence has
        x's dtype, or float32 where that is a half precision. With grad enabled both are differentiable
        in x, t and all parameters, to any order that the field supports; under `torch.no_grad` and
        `torch.inference_mode` no graph is built. Within the transforms of `torch.func` (`grad`, `jacrev`, `jvp`, `vmap` of
        single samples) it is taken by dense products of their kind, and nothing is verified; within `torch.compile` it runs
        eagerly, between two graphs.

    Raises:
        FieldError: the field, t or x is not what the definition needs, or samples are mixed; the message says what to do.

    Warns:
        FieldWarning: once a field, that autograd does not see all of how it depends on x (`divflow.verification`).

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> value_and_divergence(lambda t, x: t * x**2, 0.5, x).divergence
        tensor([3., 7.])
    """
    field = given(g, context, x)
    if not detached:
        return estimator(field, t, x)
    with severed_fields("allow"):
        return estimator(field, t, x)


def divergence(
    g: Callable[..., Tensor],
    t: Tensor | float,
    x: Tensor,
    estimator: Estimator = _EXACT,
    *,
    detached: bool = False,
    context: Context | None = None,
) -> Tensor:
    """The divergence of g at (t, x), shape `(k,)`: the second half of `value_and_divergence`.

    Example:
        >>> import torch
        >>> images = torch.ones(2, 3, 4, 4)
        >>> divergence(lambda t, x: x**3, 0.0, images)
        tensor([144., 144.])
        >>> labels = torch.tensor([0, 1])
        >>> divergence(lambda t, x, c: (1 + c["label"])[:, None] * x, 0.0, torch.ones(2, 3), context={"label": labels})
        tensor([3., 6.])
    """
    return value_and_divergence(g, t, x, estimator, detached=detached, context=context).divergence
