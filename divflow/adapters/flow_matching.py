"""Velocity models of flow_matching, called as model(x, t, **extras)."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.distributions import Distribution

from divflow.adapters.foreign import Foreign, adapted_flow
from divflow.divergence import Estimator
from divflow.errors import checked_event_shape
from divflow.flow import ContinuousFlow
from divflow.likelihood import Likelihood
from divflow.solver import Solver

__all__ = ["from_flow_matching"]


class _FlowMatching(Foreign):
    signature = "model(x, t)"


def from_flow_matching(
    model: Callable[..., Tensor],
    event_shape: int | Sequence[int],
    *,
    context_name: str | None = None,
    base: Distribution | None = None,
    estimator: Estimator | None = None,
    likelihood: Likelihood | None = None,
    solver: Solver | None = None,
    data_range: tuple[float, float] | None = None,
) -> ContinuousFlow:
    """Make a flow of a model trained by flow_matching (Lipman et al. 2022, arXiv:2210.02747; 2024, arXiv:2412.06264).

        dx/dt = model(x, t),   noise at t = 0, data at t = 1

    This is flow_matching's own convention (`flow_matching.solver.ODESolver`), so nothing is converted:

        log p(x) = log N(x_0; 0, I) - integral from 0 to 1 of (div model)(x_t, t) dt

    Args:
        model: `model(x, t)`, such as a `flow_matching.utils.ModelWrapper`, which must predict the velocity. A conditional one takes
            the context as its third argument, `model(x, t, context)`, or by name.
        event_shape: shape of one sample, without the batch; an int for vectors.
        context_name: name of the extra for the context, such as "label" in `model(x, t, label=context)`.
        base: source distribution that the model was trained with; the standard normal if None.
        estimator: of the divergence; `Exact()` if None.
        likelihood: `Quadrature(tolerance=1e-3)` if None.
        solver: of the trajectory; `Solver(rtol=1e-6, atol=1e-6)` if None.
        data_range: least and largest values of the training data, (-1, 1) for most models of images.

            - It is kept as `flow.data_range`; data in other units raise a warning, and `divflow evaluate` converts images to it.
            - `FlowDensity(flow, Affine.between((0, 1), flow.data_range))` is the density of data in [0, 1].

    Returns:
        The flow, from noise at t_base = 0 to data at t_data = 1.

    Raises:
        ValueError: data_range is not a range.
        AdapterError: the model takes its arguments in the other order, returns another shape, or has dropout or batch
            normalization in training mode.

    Example:
        >>> import torch
        >>> flow = from_flow_matching(lambda x, t: -x, 2)
        >>> flow.log_prob(torch.zeros(1, 2))
        tensor([0.1621])
    """
    velocity = _FlowMatching(model, (0.0, 1.0), context_name)
    return adapted_flow(
        velocity,
        velocity,
        checked_event_shape(event_shape),
        base=base,
        estimator=estimator,
        likelihood=likelihood,
        solver=solver,
        data_range=data_range,
    )
