"""Training a continuous normalizing flow by maximum likelihood."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from divflow.data.batch import Batch, Keys
from divflow.divergence import check_field
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.solving import check_noise
from divflow.likelihood import PENALTIES
from divflow.solver import Evaluations
from divflow.tasks.flow_density import FlowDensityTask
from divflow.tasks.task import mean

__all__ = ["FlowTask"]


class FlowTask(FlowDensityTask):
    """Train a flow by maximum likelihood.

    The loss is the mean of -log p(x) over a batch, in nats, and a weighted mean if samples have weights (`Task`). The density is
    that of the data x, not of the transformed data T(x) that the flow models:

        log p(x) = log p_flow(T(x)) + log |det dT/dx|

    Logged under `train/`, `val/` and `test/`:

    | name | meaning |
    |---|---|
    | `nll` | mean of -log p(x), in nats |
    | `bits_per_dim` | of discrete data |
    | `gap` | nats above the true density, where it is known |
    | `nfe`, `nfe_divergence` | evaluations of the velocity and of its divergence; `train/nfe_backward` those of the backward pass |
    | `quadrature_error` | of the integral along the trajectory, in nats, where it is known |
    | `estimator_error` | of a stochastic estimator: standard error of one sample's log-density, root mean square, in nats |

    Logged in the test alone:

    | name | meaning |
    |---|---|
    | `nll_standard_error`, ... | standard errors of `nll`, `bits_per_dim` and `gap` |
    | `nll_estimator_error`, ... | error that the probes leave in the means |
    | `dequantization_error`, `bits_per_dim_dequantization_error` | the same for the noise of discrete data, if the test draws it several times |
    | `bits_per_dim_importance_weighted` | a tighter bound from several draws, for an exact divergence |
    | values of `reweighted` | estimates of weighted samples, for data with an energy |

    Args:
        flow: flow that is trained and saved, or a `FlowDensity`, which adds the transform of the data to it.
        optimizer: function of the parameters that returns the optimizer.
        scheduler: function of the optimizer that returns a learning rate schedule; None for none. It steps after every
            optimizer step; a `ReduceLROnPlateau` steps after every validation.
        regularization: weights of penalties that are added to the loss, `{"kinetic_energy": a, "jacobian_norm": b}`:

            - `kinetic_energy` is the batch mean of the integral of |v|^2 dt along the trajectories; it costs nothing.
            - `jacobian_norm` is that of |dv/dx|_F^2 dt. It reuses the products of an estimated divergence; beside an exact one it
              costs one more probe at each node.
            - Both are logged in training (Finlay et al. 2020, equation 5). A penalty of weight zero is not computed.
        evaluation: flow that validation and test evaluate, for example with another estimator or solver. It shares the
            velocity of the trained flow; that flow itself if None.
        config: plain dict that is saved in each checkpoint. `divflow.load` rebuilds the density from it, and
            `load_from_checkpoint` the task, if it has `task`, as `build_task` takes it.
        monitor: name of the validation value that `ReduceLROnPlateau` follows; `val/nll` if None.
        keys: where x, context and weight are in a batch that is a dict or a tuple of other parts, such as
            `{"x": "image", "context": "label"}` or `{"x": 0, "weight": 2}` (`divflow.data.batch.parts_of`).

    Raises:
        ValueError: a penalty is unknown, or its weight is negative or not finite.
        DataError, FieldError: in training, `parts_of` refuses a batch.
        TrainingError: in training, a loss or gradient is not finite.

    Example:
        >>> from divflow import ContinuousFlow
        >>> from divflow.networks import MLP
        >>> task = FlowTask(ContinuousFlow(MLP(2), 2))  # for lightning.Trainer().fit(task, loader)
    """

    density: FlowDensity

    def __init__(
        self,
        flow: ContinuousFlow | FlowDensity,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        regularization: Mapping[str, float] | None = None,
        evaluation: ContinuousFlow | None = None,
        config: dict[str, Any] | None = None,
        monitor: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        super().__init__(flow, optimizer, scheduler, evaluation, config, monitor, keys)
        self._regularization = _checked_regularization(regularization or {})
        # Evaluations of the last step alone: the result would keep its graph.
        self._evaluations: Evaluations | None = None

    def check(self, batch: Batch) -> None:
        """Check the velocity before the first step: a field that treats samples independently, with correct derivatives.

        In training mode it must not be random if the solver is adaptive.

        Raises:
            FieldError: it is not.
        """
        flow, (x, context) = self.density.flow, self.checked(batch)
        field, t = flow.field(context), flow.times()[0]
        check_field(field, t, x, detached=flow.detached, gradient=True, estimator=flow.estimator)
        check_noise(field, t, x, flow.solver, flow.velocity)
        self.check_base(x, context)

    def loss(self, batch: Batch) -> Tensor:
        """Mean of -log p(x), or of -log p(x | context), over a batch, plus the penalties, in nats."""
        x, context, weight = self.parts(batch)
        result = self.density.evaluate(x, context, diagnostics=False, penalties=tuple(self._regularization))
        self._evaluations = result.evaluations
        shares = self.shares(weight)
        nll = -mean(result.log_prob, shares)
        loss = nll
        for name, penalty in result.penalties.items():
            loss = loss + self._regularization[name] * mean(penalty, shares)
            self.log(f"train/{name}", mean(penalty.detach(), shares))
        self.log("train/nll", nll.detach())
        self.log("train/nfe", self.count(result.evaluations.forward))
        self.log("train/nfe_divergence", self.count(result.evaluations.divergence))
        if result.quadrature_error is not None:
            self.log("train/quadrature_error", mean(result.quadrature_error, shares))
        bits = None if self.data is None else self.data.bits_per_dim(result.log_prob.detach(), x)
        if bits is not None:
            self.log("train/bits_per_dim", mean(bits, shares))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the evaluations of the backward pass, which only an adjoint gradient has."""
        if self._evaluations is not None:
            self.log("train/nfe_backward", self.count(self._evaluations.backward))


def _checked_regularization(weights: Mapping[str, float]) -> dict[str, float]:
    """The penalties of positive weight."""
    unknown = set(weights) - set(PENALTIES)
    if unknown:
        raise ValueError(f"the keys of regularization must be among {sorted(PENALTIES)}, but got {sorted(unknown)}")
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"the weight of {name} must be finite and not negative, but is {weight!r}. Use 0 to turn it off"
            )
    return {name: weight for name, weight in weights.items() if weight}
