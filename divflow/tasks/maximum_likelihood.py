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
from divflow.likelihood import PENALTIES
from divflow.solver import Evaluations
from divflow.tasks.flow_density import FlowDensityTask
from divflow.tasks.task import mean

__all__ = ["FlowTask"]


class FlowTask(FlowDensityTask):
    """Maximum likelihood: the loss is the mean of -log p(x) over the batch, in nats.

    It is a weighted mean, where samples have weights (`Task`). Log-densities are those of the data, not of what the data module's transform T makes of them:

        log p(x) = log p_flow(T(x)) + log |det dT/dx|

    and where its data are discrete, bits per dimension are logged too.

    Logged: `{train,val,test}/nll` (nats), `/bits_per_dim`, `/gap` (nats above the truth, where it is known),
    `/nfe` (forward), `/nfe_divergence`, `/quadrature_error` (nats, where known), `train/nfe_backward`; in the test
    also the standard errors `test/nll_standard_error`, and those of bits per dimension and gap. A stochastic estimator
    adds `/estimator_error`, the standard error of one sample's log-density over its probes (root mean square, nats),
    and, in the test, `/nll_estimator_error` and `/bits_per_dim_estimator_error`, what that leaves of error in the mean.
    Where the data module draws noise several times for each row of the test (`num_draws`), log-densities are averages over
    the draws, `/dequantization_error` and `/bits_per_dim_dequantization_error` say the same of that noise, and
    `/bits_per_dim_importance_weighted` is the nearer bound, where the divergence is exact. Where the data have an energy, the test
    logs what `reweighted` says of weighted samples.

    Args:
        flow: what is trained and saved: a flow, or a `FlowDensity`, which adds the data's transform to it.
        optimizer: function of the parameters that makes the optimizer.
        scheduler: function of the optimizer that makes a learning rate schedule, stepped after every step of the optimizer, or, if it
            is a `ReduceLROnPlateau`, after every validation; None for none.
        regularization: weights of penalties that are added to the loss, in nats: `{"kinetic_energy": a, "jacobian_norm":
            b}` adds the batch mean of a * integral of |v|^2 dt + b * integral of |dv/dx|_F^2 dt along the trajectories
            (Finlay et al. 2020, equation 5); logged as `train/kinetic_energy` and `train/jacobian_norm`. A penalty
            of weight zero is not computed. The first costs nothing, the second little where the divergence is
            estimated (its products are used again), or one more probe at each node where it is exact.
        evaluation: the flow that judges in validation and test, such as one of another estimator or solver that
            shares the trained one's velocity; the trained one itself if None.
        config: a plain dict to save in each checkpoint, from which `divflow.load` rebuilds the density, and `load_from_checkpoint` the
            task, if it has `task`, as `build_task` takes it.
        monitor: the validation's value that `ReduceLROnPlateau` follows; `val/nll` if None.
        keys: where x, context and weight are in a batch that is a dict or a tuple of other parts, such as `{"x": "image", "context":
            "label"}` or `{"x": 0, "weight": 2}` (`divflow.data.batch.parts_of`).

    Raises:
        ValueError: an unknown or negative regularization.
        DataError, FieldError: while training, a batch that `parts_of` refuses.
        TrainingError: a loss or gradient that is not finite.
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
        # Of the last step alone, whose graph would be kept with the rest.
        self._evaluations: Evaluations | None = None

    def check(self, batch: Batch) -> None:
        """Before the first step: the velocity must be a field, treat the samples independently, and have right derivatives."""
        flow, (x, context) = self.density.flow, self.checked(batch)
        field, t = flow.field(context), flow.times()[0]
        check_field(field, t, x, detached=flow.detached, gradient=True, estimator=flow.estimator)
        self.check_base(x, context)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, in nats: the mean of -log p(x), or of -log p(x | context), and the regularization."""
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
        """Log what the backward pass evaluated: something under an adjoint gradient, else nothing."""
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
