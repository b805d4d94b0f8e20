"""Velocity models of torchcfm and torchdyn, called as model(t, x)."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.distributions import Distribution

from divflow.adapters.foreign import Foreign, adapted_flow
from divflow.divergence import Estimator
from divflow.errors import checked_event_shape
from divflow.flow import ContinuousFlow
from divflow.likelihood import Likelihood
from divflow.solver import Solver

__all__ = ["from_torchcfm"]


class _TorchCFM(Foreign):
    signature = "model(t, x)"
    time_first = True


def from_torchcfm(
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
    """Make a flow of a model trained by torchcfm (Tong et al. 2023, arXiv:2302.00482).

        dx/dt = model(t, x),   x_0 of the source at t = 0, data x_1 at t = 1

    This is torchcfm's own convention (`torchcfm.conditional_flow_matching`, target x_1 - x_0), so nothing is converted:

        log p(x) = log p_source(x_0) - integral from 0 to 1 of (div model)(t, x_t) dt

    torchcfm's MLP takes one matrix of states and times; wrap it by its `torch_wrapper`, which makes `model(t, x)` of it, for
    scalar times. Its UNet is `model(t, x, y)` with labels y, the context.

    Args:
        model: `model(t, x)`, which must predict the velocity, not the score of a Schroedinger bridge. A conditional one takes the
            context as its third argument, `model(t, x, context)`, or by name.
        event_shape: shape of one sample, without the batch; an int for vectors.
        context_name: name of the model's argument for the context, such as "y" in `model(t, x, y=context)`.
        base: source distribution that the model was trained with; the standard normal if None.
        estimator: of the divergence; `Exact()` if None.
        likelihood: `Quadrature(tolerance=1e-3)` if None.
        solver: of the trajectory; `Solver(rtol=1e-6, atol=1e-6)` if None.
        data_range: least and largest values of the training data, (-1, 1) for most models of images.

            - It is kept as `flow.data_range`; data in other units raise a warning, and `divflow evaluate` converts images to it.
            - `FlowDensity(flow, Affine.between((0, 1), flow.data_range))` is the density of data in [0, 1].

    Returns:
        The flow, from the source at t_base = 0 to data at t_data = 1.

    Raises:
        ValueError: data_range is not a range.
        AdapterError: the model takes its arguments in the other order, returns another shape, or has dropout or batch
            normalization in training mode.

    Example:
        >>> import torch
        >>> flow = from_torchcfm(lambda t, x: -x, 2)
        >>> flow.log_prob(torch.zeros(1, 2))
        tensor([0.1621])
    """
    velocity = _TorchCFM(model, (0.0, 1.0), context_name)
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
