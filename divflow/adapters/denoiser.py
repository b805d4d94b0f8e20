"""Denoisers D(x, sigma), which estimate data from noisy data, as flows along the noise level."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from divflow.adapters.foreign import AdapterError, Foreign, adapted_flow
from divflow.divergence import Estimator
from divflow.errors import checked_event_shape
from divflow.flow import ContinuousFlow
from divflow.flow.settings import tensor_settings
from divflow.likelihood import Likelihood
from divflow.operators.context import Context
from divflow.score.sde import broadcast
from divflow.solver import Solver

__all__ = ["PREDICTIONS", "DenoisingVelocity", "Scaling", "denoising_flow", "from_denoiser"]

# D = p y + q f for what a network f may predict, at s = log sigma.
PREDICTIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "sample": lambda s: (torch.zeros_like(s), torch.ones_like(s)),
    "epsilon": lambda s: (torch.ones_like(s), -s.exp()),
    "v_prediction": lambda s: (torch.sigmoid(-2 * s), -torch.sigmoid(2 * s).sqrt()),
}


@dataclass(frozen=True)
class Scaling:
    """Scale r(s) of noisy data y = x + sigma n, s = log sigma, at which z = r y hardly changes in size.

        w = c^2 / (c^2 + sigma^2),   r(s)^2 = w(s) / w(log sigma_min)

    Solvers take about twice as many evaluations for y itself, which grows with sigma. At sigma_min, z = y.

    Args:
        std: c, about the standard deviation of the data.
        log_sigma_min: s at which r = 1.
    """

    std: float
    log_sigma_min: float

    def share(self, s: Tensor) -> Tensor:
        """Share w of the signal in the variance, of s's shape."""
        return torch.sigmoid(2 * (math.log(self.std) - s))

    def factor(self, s: Tensor) -> Tensor:
        """Factor r, of s's shape."""
        return (self.share(s) / self.share(torch.full_like(s, self.log_sigma_min))).sqrt()


class DenoisingVelocity(nn.Module):
    """Velocity dz/ds of noisy data z = r y over s = log sigma, r a `Scaling` (Karras et al. 2022, equation 4).

        dz/ds = w z - r D(z / r, sigma) = (w - p) z - r q f,   D = p y + q f
        div dz/ds = (w - p) dim - r q tr df/dz

    For normal data of the scaling's standard deviation D is w y, and the velocity vanishes. An estimator of the divergence thus sees
    only how the data differ from those. (Estimating f alone, and adding the first term, has the same variance with Rademacher
    probes. With Gaussian ones or Hutch++ it has a variance several times larger, because the two terms nearly cancel.)

    Args:
        model: f, a function of s and z.
        prediction: what f predicts, one of `PREDICTIONS`:

            - "sample": D itself, p = 0 and q = 1;
            - "epsilon": the noise n = (y - D) / sigma, p = 1 and q = -sigma;
            - "v_prediction": (n - sigma D) / sqrt(1 + sigma^2), p = 1 / (1 + sigma^2) and q = -sigma / sqrt(1 + sigma^2).
        scaling: r and w.
    """

    def __init__(self, model: Foreign, prediction: str, scaling: Scaling) -> None:
        super().__init__()
        self.model, self.prediction, self.scaling = model, prediction, scaling

    def finest_scale(self, t: Tensor) -> Tensor:
        """Size r sigma of the details that noise leaves at t = log sigma; the tolerances of a solver should be of this size."""
        return self.scaling.factor(t) * t.exp()

    def forward(self, t: Tensor, x: Tensor, context: Context | None = None) -> Tensor:
        """Velocity at t = log sigma, `()` or `(k,)`, and scaled data x `(k, *event)`."""
        p, q = PREDICTIONS[self.prediction](t)
        linear, factor = self.scaling.share(t) - p, -self.scaling.factor(t) * q
        return broadcast(linear, x) * x + broadcast(factor, x) * self.model(t, x, context)


class _Denoiser(Foreign):
    signature = "D(x, sigma)"

    def __init__(
        self, model: Callable[..., Tensor], times: tuple[float, float], scaling: Scaling, name: str | None
    ) -> None:
        super().__init__(model, times, name)
        self.scaling = scaling

    def arguments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy data, and their noise level."""
        return x / broadcast(self.scaling.factor(t), x), t.exp()


def from_denoiser(
    D: Callable[..., Tensor],  # noqa: N803 - its name in the paper
    event_shape: int | Sequence[int],
    sigma_min: float,
    sigma_max: float,
    *,
    data_std: float = 0.0,
    context_name: str | None = None,
    estimator: Estimator | None = None,
    likelihood: Likelihood | None = None,
    solver: Solver | None = None,
    data_range: tuple[float, float] | None = None,
) -> ContinuousFlow:
    """Make a flow of a denoiser D(x, sigma), the mean of the data given noisy data x (Karras et al. 2022, arXiv:2206.00364).

        dx/dsigma = (x - D(x, sigma)) / sigma,   data at sigma_min, noise at sigma_max     (equations 1 and 3)

    The time of the flow is s = log sigma. Its state is z = r x with r^2 = (c^2 + sigma_min^2) / (c^2 + sigma^2), which hardly
    changes in size and equals x at sigma_min (c is data_std, or 1):

        dz/ds = c^2 / (c^2 + sigma^2) z - r D(z / r, sigma)
        div dz/ds = dim c^2 / (c^2 + sigma^2) - r tr dD/dz

    - The density is that of the data with noise of sigma_min.
    - The base is N(0, (sigma_max^2 + data_std^2) r^2 I). It neglects the mean of the data, of relative size mean / sigma_max, and
      their variance if data_std is not given.

    Args:
        D: `D(x, sigma)`, sigma `()` or `(k,)`, including its preconditioning, such as EDM's `EDMPrecond`. A conditional one takes
            the context, such as class labels, as its third argument or by name.
        event_shape: shape of one sample, without the batch; an int for vectors.
        sigma_min: least noise, in units of the data; 0.002 in EDM.
        sigma_max: noise at which nothing of the data is left; 80 in EDM.
        data_std: standard deviation of the data, if known, which the base includes.
        context_name: name of the model's argument for the context, such as "class_labels".
        estimator: of the divergence; `Exact()` if None.
        likelihood: `Quadrature(tolerance=1e-3)` if None.
        solver: of the trajectory; `Solver(rtol=1e-6, atol=1e-6)` if None.
        data_range: least and largest values of the training data, (-1, 1) for most models of images.

            - It is kept as `flow.data_range`; data in other units raise a warning, and `divflow evaluate` converts images to it.
            - `FlowDensity(flow, Affine.between((0, 1), flow.data_range))` is the density of data in [0, 1].

    Returns:
        The flow, from noise at t_base = log sigma_max to data at t_data = log sigma_min.

    Raises:
        ValueError: data_range is not a range.
        AdapterError: not 0 < sigma_min < sigma_max, or data_std is negative; the model takes its arguments in the other order,
            returns another shape, or has dropout or batch normalization in training mode.

    Example:
        >>> flow = from_denoiser(lambda x, sigma: x / (1 + sigma**2), 2, 0.01, 80.0, data_std=1.0)  # standard normal data
        >>> flow.log_prob(torch.zeros(1, 2))
        tensor([-1.8380])
    """
    if not (isinstance(sigma_min, Real) and isinstance(sigma_max, Real) and 0 < sigma_min < sigma_max < math.inf):
        raise AdapterError(
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, but got sigma_min={sigma_min!r} and sigma_max={sigma_max!r}"
        )
    if not (isinstance(data_std, Real) and 0 <= data_std < math.inf):
        raise AdapterError(f"data_std must be positive and finite, or 0 if it is unknown, but is {data_std!r}")
    times = math.log(sigma_min), math.log(sigma_max)
    scaling = Scaling(data_std or 1.0, times[0])
    return denoising_flow(
        _Denoiser(D, times, scaling, context_name),
        "sample",
        scaling,
        checked_event_shape(event_shape),
        math.hypot(sigma_max, data_std),
        estimator=estimator,
        likelihood=likelihood,
        solver=solver,
        data_range=data_range,
    )


def denoising_flow(
    model: Foreign,
    prediction: str,
    scaling: Scaling,
    event_shape: tuple[int, ...],
    base_std: float,
    *,
    estimator: Estimator | None,
    likelihood: Likelihood | None,
    solver: Solver | None,
    data_range: tuple[float, float] | None,
) -> ContinuousFlow:
    """Make the flow of a model over the log sigma that it knows, from noisy data y of standard deviation `base_std`."""
    t_data, t_base = model.times
    std = base_std * scaling.factor(torch.tensor(t_base, dtype=torch.float64, device="cpu")).item()
    device = tensor_settings(model.model).get("device")
    loc, scale = torch.zeros(event_shape, device=device), torch.full(event_shape, std, device=device)
    normal = Normal(loc, scale, validate_args=False)
    return adapted_flow(
        model,
        DenoisingVelocity(model, prediction, scaling),
        event_shape,
        base=Independent(normal, len(event_shape)),
        t_base=t_base,
        t_data=t_data,
        estimator=estimator,
        likelihood=likelihood,
        solver=solver,
        data_range=data_range,
    )
