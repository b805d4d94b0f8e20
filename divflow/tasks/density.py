"""A flow together with the preprocessing of its data: a density of the data themselves."""

from collections.abc import Collection

import torch
from torch import Generator, Tensor, nn

from divflow.data.transforms import Transform
from divflow.flow import ContinuousFlow, FlowEvaluation

__all__ = ["FlowDensity"]


class FlowDensity(nn.Module):
    """The density of data x whose transform y = T(x) a flow models; what `divflow.load` returns.

        log p(x) = log p_flow(T(x)) + log |det dT/dx|      x = T^-1(y), y from the flow

    Args:
        flow: of the transformed data.
        transform: from the data, with its log-determinant.
    """

    def __init__(self, flow: ContinuousFlow, transform: Transform) -> None:
        super().__init__()
        self.flow, self.transform = flow, transform

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the flow computes in."""
        tensors = (*self.flow.parameters(), *self.flow.buffers())
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())

    def log_prob(self, x: Tensor, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """The log-density of data x `(k, *event)` in nats, `(k,)`."""
        return self.evaluate(x, context, generator, diagnostics=False).log_prob

    def evaluate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: Generator | None = None,
        *,
        diagnostics: bool = True,
        penalties: Collection[str] = (),
    ) -> FlowEvaluation:
        """`ContinuousFlow.evaluate` of the transformed data, with the transform's log-determinant added.

        Args:
            x: data `(k, *event)`.
            context: one row a sample.
            generator: of a stochastic estimator's probes.
            diagnostics: estimate the errors even where that takes further evaluations.
            penalties: integrals to take along the trajectory, as `ContinuousFlow.evaluate`.
        """
        y, log_det = self.transform(x)
        y, log_det = y.to(self.dtype), log_det.to(self.dtype)
        result = self.flow.evaluate(y, context, generator, diagnostics=diagnostics, penalties=penalties)
        return result._replace(log_prob=result.log_prob + log_det, log_det=result.log_det + log_det)

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Samples of the data `(num_samples, *event)`, without gradient."""
        return self.transform.inverse(self.flow.sample(num_samples, context, generator))
