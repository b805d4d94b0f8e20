"""Training a continuous normalizing flow by maximum likelihood."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from divflow.data.module import TensorDataModule
from divflow.data.transforms import Affine
from divflow.divergence import check_field
from divflow.flow import ContinuousFlow, FlowEvaluation
from divflow.likelihood import PENALTIES
from divflow.tasks.density import FlowDensity
from divflow.tasks.metrics import MeanWithStandardError

__all__ = ["FlowTask"]


class FlowTask(L.LightningModule):
    """Maximum likelihood: the loss is the mean of -log p(x) over the batch, in nats.

    Log-densities are those of the data, not of what the data module's transform T makes of them:

        log p(x) = log p_flow(T(x)) + log |det dT/dx|

    and where its data are discrete, bits per dimension are logged too.

    Logged: `{train,val,test}/nll` (nats), `/bits_per_dim`, `/gap` (nats above the truth, where it is known),
    `/nfe` (forward), `/nfe_divergence`, `/quadrature_error` (nats, where known), `train/nfe_backward`; in the test
    also the standard errors `test/nll_standard_error`, and those of bits per dimension and gap. A stochastic estimator
    adds `/estimator_error`, the standard error of one sample's log-density over its probes (root mean square, nats),
    and, in the test, `/nll_estimator_error` and `/bits_per_dim_estimator_error`, what that leaves of error in the mean.

    Args:
        flow: what is trained and saved: a flow, or a `FlowDensity`, which adds the data's transform to it.
        optimizer: function of the parameters that makes the optimizer.
        scheduler: function of the optimizer that makes a learning rate schedule, stepped after every
            training step; None for none.
        regularization: weights of penalties that are added to the loss, in nats: `{"kinetic_energy": a, "jacobian_norm":
            b}` adds the batch mean of a * integral of |v|^2 dt + b * integral of |dv/dx|_F^2 dt along the trajectories
            (Finlay et al. 2020, equation 5); logged as `train/kinetic_energy` and `train/jacobian_norm`. A penalty
            of weight zero is not computed. The first costs nothing, the second little where the divergence is
            estimated (its products are used again), or one more probe at each node where it is exact.
        evaluation: the flow that judges in validation and test, such as one of another estimator or solver that
            shares the trained one's velocity; the trained one itself if None.
        config: a plain dict to save in each checkpoint, from which `divflow.load` rebuilds the density.

    Raises:
        ValueError: an unknown or negative regularization.
    """

    def __init__(
        self,
        flow: ContinuousFlow | FlowDensity,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        regularization: Mapping[str, float] | None = None,
        evaluation: ContinuousFlow | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.density = flow if isinstance(flow, FlowDensity) else FlowDensity(flow, Affine())
        # In a tuple, so that it is no submodule: it shares the trained flow's parameters.
        self._evaluation = (self.density.flow if evaluation is None else evaluation,)
        self._optimizer, self._scheduler, self._config = optimizer, scheduler, config
        self._regularization = _checked_regularization(regularization or {})
        self._checked = False
        self._last: FlowEvaluation | None = None
        self._metrics: dict[str, MeanWithStandardError] = {}

    @property
    def data(self) -> TensorDataModule | None:
        """The data module, where it is one of divflow's."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, TensorDataModule) else None

    @property
    def judged(self) -> FlowDensity:
        """The density as validation and test evaluate it."""
        return FlowDensity(self._evaluation[0], self.density.transform)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and the schedule by steps."""
        optimizer = self._optimizer(self.parameters())
        if self._scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"}}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of a batch `(k, *event)`, in nats: the mean of -log p(x), and the regularization."""
        if not self._checked:
            self._check(batch)
        result = self.density.evaluate(batch, diagnostics=False, penalties=tuple(self._regularization))
        self._last = result
        nll = -result.log_prob.mean()
        loss = nll
        for name, penalty in result.penalties.items():
            loss = loss + self._regularization[name] * penalty.mean()
            self.log(f"train/{name}", penalty.detach().mean())
        self.log("train/nll", nll.detach(), prog_bar=True)
        self.log("train/nfe", float(result.evaluations.forward), prog_bar=True)
        self.log("train/nfe_divergence", float(result.evaluations.divergence))
        if result.quadrature_error is not None:
            self.log("train/quadrature_error", result.quadrature_error.mean())
        if self._bits is not None:
            self.log("train/bits_per_dim", self._bits(nll.detach()))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the backward pass evaluated: something under an adjoint gradient, else nothing."""
        self.log("train/nfe_backward", float(self._last.evaluations.backward))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a batch to the validation averages."""
        self._judge(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a batch to the test averages."""
        self._judge(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the validation averages."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the test averages and their standard errors."""
        self._report("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what `divflow.load` needs to rebuild the density."""
        if self._config is not None:
            checkpoint["divflow"] = self._config

    def _judge(self, batch: Tensor, stage: str) -> None:
        result = self.judged.evaluate(batch)
        nll = -result.log_prob
        values = {
            "nll": nll,
            "nfe": torch.full_like(nll, result.evaluations.forward),
            "nfe_divergence": torch.full_like(nll, result.evaluations.divergence),
            "quadrature_error": result.quadrature_error,
        }
        if result.standard_error is not None:
            values["estimator_variance"] = result.standard_error.square()
        data = self.data
        truth = None if data is None else data.log_prob(batch)
        if truth is not None:
            values["gap"] = truth - result.log_prob
        for name, value in values.items():
            if value is not None:
                key = f"{stage}/{name}"
                if key not in self._metrics:
                    self._metrics[key] = MeanWithStandardError().to(self.device)
                self._metrics[key].update(value)

    def _report(self, stage: str) -> None:
        for key, metric in self._metrics.items():
            if not key.startswith(stage):
                continue
            mean, error = metric.compute()
            if key.endswith("estimator_variance"):
                self.log(f"{stage}/estimator_error", mean.sqrt())
                if stage == "test":
                    self._log_nll_error("estimator_error", (mean / metric.count).sqrt().to(mean))
            else:
                self.log(key, mean, prog_bar=key == "val/nll")
                if key.endswith("nll") and self._bits is not None:
                    self.log(f"{stage}/bits_per_dim", self._bits(mean))
                if key == "test/nll":
                    self._log_nll_error("standard_error", error)
                elif key == "test/gap":
                    self.log("test/gap_standard_error", error)
            metric.reset()

    def _log_nll_error(self, name: str, error: Tensor) -> None:
        self.log(f"test/nll_{name}", error)
        if self._bits is not None:
            self.log(f"test/bits_per_dim_{name}", self._bits(error) - self._bits(torch.zeros_like(error)))

    @property
    def _bits(self) -> Callable[[Tensor], Tensor] | None:
        """From nats of the dequantized data to bits per dimension of the discrete ones."""
        data = self.data
        if data is None or data.levels is None:
            return None
        size = math.prod(self.density.flow.event_shape)
        return lambda nll: nll / (size * math.log(2)) + math.log2(data.levels)

    def _check(self, batch: Tensor) -> None:
        """Before the first step: the velocity must be a field, and treat the samples independently."""
        with torch.no_grad():
            x, _ = self.density.transform(batch)
        flow = self.density.flow
        check_field(flow.field(), flow.times()[0], x.to(self.density.dtype))
        self._checked = True


def _checked_regularization(weights: Mapping[str, float]) -> dict[str, float]:
    """The penalties of positive weight."""
    unknown = set(weights) - set(PENALTIES)
    if unknown:
        raise ValueError(f"regularization must be of {sorted(PENALTIES)}, but got {sorted(unknown)}")
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {name} must be finite and not negative, but is {weight!r}; 0 turns it off")
    return {name: weight for name, weight in weights.items() if weight}
