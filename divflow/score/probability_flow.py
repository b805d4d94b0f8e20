"""The ODE that has the marginals of an SDE, as a continuous normalizing flow: likelihoods and samples of a score."""

import functools

from torch import Tensor, nn

from divflow.divergence import Estimator
from divflow.divergence.exact.own import OwnDivergence, own_divergence
from divflow.flow import ContinuousFlow
from divflow.flow.settings import tensor_settings
from divflow.likelihood import Likelihood, Quadrature
from divflow.manifolds import TangentField
from divflow.operators.field import checked_value, event_size
from divflow.score.field import Score, as_field
from divflow.score.prior import Prior
from divflow.score.sde import SDE, broadcast
from divflow.solver import Solver

__all__ = ["ProbabilityFlow", "probability_flow"]


class ProbabilityFlow(nn.Module):
    """The velocity of the ODE that has the marginals of an SDE.

        v(t, x) = f(t) x - g(t)^2 s(t, x) / 2

    (Song et al. 2021, arXiv:2011.13456, equation 13).

    Args:
        score: `score(t, x)`; a module's parameters become this one's.
        sde: to whose marginals p_t the score belongs.
    """

    def __init__(self, score: Score, sde: SDE) -> None:
        super().__init__()
        self.score, self.sde = as_field(score), sde

    @property
    def divflow_identity(self) -> tuple[object, ...]:
        """What identifies this field, for plans to be kept from one call to the next."""
        return self.score, self.sde

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate the velocity at time t, `()` or `(k,)`, and state x `(k, *event)`."""
        drift, squared_diffusion = (broadcast(values, x) for values in self.sde.coefficients(t))
        return drift * x - squared_diffusion / 2 * checked_value(self.score(t.clone(), x.clone()), x)

    def finest_scale(self, t: Tensor) -> Tensor:
        """Return sigma(t): the noise blurs all details of p_t that are finer; a solver's `atol` follows it."""
        return self.sde.std(t)

    @property
    def value_and_divergence(self) -> OwnDivergence | None:
        """The velocity and its divergence D f(t) - g(t)^2 (div s)(t, x) / 2, if the score knows its own."""
        own = own_divergence(self.score)
        return None if own is None else functools.partial(self._linear_in, own)

    def _linear_in(self, own: OwnDivergence, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        coefficients, (score, divergence) = self.sde.coefficients(t), own(t.clone(), x.clone())
        drift, squared_diffusion = (broadcast(values, x) for values in coefficients)
        value = drift * x - squared_diffusion / 2 * checked_value(score, x)
        return value, event_size(x) * coefficients.drift - coefficients.squared_diffusion / 2 * divergence


def probability_flow(
    score: Score,
    sde: SDE,
    *,
    estimator: Estimator | None = None,
    likelihood: Likelihood | None = None,
    solver: Solver | None = None,
) -> ContinuousFlow:
    """Turn a score into a continuous normalizing flow: log-densities and samples by the probability-flow ODE.

        log p_epsilon(x) = log N(x_T; 0, sigma(T)^2 I) + integral from epsilon to T of (div v)(t, x_t) dt

    The flow's data density is that at sde.epsilon; the noise at sde.T is its base. Two approximations belong to the model.
    Its likelihood is exact for what it samples by this ODE; they make it slightly worse.

    - Below epsilon: the density is that of the data shrunk by alpha(epsilon) and blurred by noise of sigma(epsilon)
      (`sde.marginal(sde.epsilon)`; 0.001 of the data's scale for `VariancePreserving()`), not that of the data themselves.
    - Above T: base and p_T differ by what remains of the data there, alpha(T).

    Over a `BrownianMotion` it is a flow on its manifold, of the tangent part of the score, and its base is uniform.

    Near epsilon the velocity of a sharp density is stiff. The default likelihood therefore has a tolerance and divides the
    interval where its error estimate requires it.

    Args:
        score: `score(t, x)`.
        sde: with an event shape.
        estimator: of the divergence; `Exact()` if None.
        likelihood: `Quadrature(nodes=15, tolerance=1e-3)` if None.
        solver: of the trajectory; `Solver()` if None.

    Raises:
        SDEError: the SDE has no event shape, or is one of your own whose functions are not those of an SDE.

    Example:
        >>> import torch
        >>> from divflow.score import VariancePreserving
        >>> sde = VariancePreserving(event_shape=(2,))
        >>> flow = probability_flow(lambda t, x: -x, sde)  # the score of a standard normal, at all times
        >>> flow.log_prob(torch.zeros(1, 2))
        tensor([-1.8378])
    """
    if not isinstance(sde, SDE):
        raise ValueError(f"sde must be an SDE, such as VariancePreserving(event_shape=2), but is {sde!r}")
    sde.check()
    prior = sde.prior
    return ContinuousFlow(
        ProbabilityFlow(score.field if isinstance(score, TangentField) else score, sde),
        prior.event_shape,
        base=Prior(prior.event_shape, prior.std, **tensor_settings(score)) if isinstance(prior, Prior) else None,
        manifold=sde.manifold,
        t_base=sde.T,
        t_data=sde.epsilon,
        estimator=estimator,
        likelihood=Quadrature(tolerance=1e-3) if likelihood is None else likelihood,
        solver=solver,
    )
