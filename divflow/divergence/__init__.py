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
from divflow.operators.field import Field, checked_field
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
    """Evaluate a field and its divergence together, from one evaluation of the field.

        value = g(t, x),    divergence_b = sum_i d g_i / d x_i    for each sample b

    Args:
        g: the field.

            - It is called as `g(t, x)`, or as `g(t, x, context)` with a context.
            - It returns a tensor of x's shape, dtype and device.
            - It treats the samples of a batch independently; `check_field` tests this.
        t: time, a scalar or one value per sample `(k,)`.
        x: states `(k, *event)` of a floating dtype. An event is a vector, an image, any tensor.
        estimator: `Exact()`, `Autograd()`, `Hutchinson()` or one of your own.
        detached: True declares that the field hides parts from autograd on purpose (`detach`, `no_grad`, numpy). The
            divergence leaves these parts out, which otherwise raises a warning.
        context: conditions that change from call to call.

            - A tensor or any tree of tensors (dict, tuple, list) of any dtype; g gets a copy.
            - It may require grad, and need not have one row per sample.
            - The plan for g is kept when its numbers change. A closure over them, `lambda t, x: net(t, x, c)`, is planned
              anew for each c.

    Returns:
        `ValueAndDivergence(value, divergence)` of shapes `(k, *event)` and `(k,)`.

        - The divergence has x's dtype, or float32 if that is a half precision.
        - With grad enabled both are differentiable in x, t and all parameters, to any order that the field supports.
        - Under `torch.no_grad` and `torch.inference_mode` no graph is built.
        - Inside the transforms of `torch.func` (`grad`, `jacrev`, `jvp`, `vmap` of single samples) it takes dense products
          by these transforms, and nothing is verified.
        - Inside `torch.compile` it runs eagerly, between two graphs.

    Raises:
        FieldError: the field, t or x is not what the definition needs, or the field mixes samples; the message says what
            to do.

    Warns:
        FieldWarning: once per field, if autograd does not see all of how it depends on x (`divflow.verification`).

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> value_and_divergence(lambda t, x: t * x**2, 0.5, x).divergence
        tensor([3., 7.])
    """
    field = given(checked_field(g), context, x)
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
    """Compute the divergence of a field at (t, x), one number per sample.

        (div g)(t, x)_b = sum_i d g_i / d x_i    for each sample b, over all event dimensions

    Args:
        g: the field, `g(t, x)` or `g(t, x, context)`, which returns a tensor of x's shape.
        t: time, a scalar or one value per sample `(k,)`.
        x: states `(k, *event)` of a floating dtype.
        estimator: `Exact()`, `Autograd()`, `Hutchinson()` or one of your own.
        detached: True declares that the field hides parts from autograd on purpose.
        context: conditions that change from call to call, a tensor or a tree of tensors.

    Returns:
        The divergences `(k,)`, as of `value_and_divergence`, which has the details of all arguments.

    Raises:
        FieldError: as `value_and_divergence`.

    Warns:
        FieldWarning: as `value_and_divergence`.

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
