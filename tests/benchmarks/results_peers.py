"""Peers of a run, on its split, with about its number of parameters, for its seconds: python results_peers.py NAME RUN OUT [MEASURE]

RUN is the folder of a run of divflow; OUT, a file of JSON, takes what the peer reaches.
"""

import copy
import itertools
import json
import math
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import flow_matching
import torch
import zuko
from flow_matching.path import CondOTProbPath
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from omegaconf import DictConfig, OmegaConf
from results_measures import MEASURES
from results_trained import Ours, Trained, parameters, run_config, run_data, run_results, tested
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from divflow.data.batch import Batch, parts_of
from divflow.data.module import TensorDataModule
from divflow.saved.build import build_network

# Dimensions up to which flow_matching's likelihood is exact, a product for each of them in every evaluation.
EXACT = 64


class Peer(Trained):
    """A model that is trained like ours.

    Attributes:
        rate: of learning.
        validations: on the validation rows, equally spaced in time; the best one's weights are tested, as ours are.
        evaluations: of the field so far, where there is one.
    """

    rate: float
    validations = 8
    evaluations = 0

    @abstractmethod
    def loss(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Of a batch, `()`."""

    def evaluating(self) -> "Peer":
        """The model ready to be evaluated."""
        self.model.eval()
        return self


class Zuko(Peer):
    """A flow of zuko over the transformed data, with the transform's log-determinant; a CNF is evaluated exactly."""

    def __init__(self, model: nn.Module, data: TensorDataModule, rate: float) -> None:
        super().__init__(model, data)
        self.rate = rate

    def loss(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Maximum likelihood."""
        return -self.log_prob(x, context).mean()

    def evaluating(self) -> "Zuko":
        """With exact divergences, and their evaluations counted."""
        if isinstance(self.model, zuko.flows.CNF):
            self.model.transform.exact = True
            self.model.transform.ode.register_forward_hook(self._count)
        return super().evaluating()

    def _count(self, *_: object) -> None:
        self.evaluations += 1

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """By zuko."""
        y, log_det = self.data.transform(x)
        return self._given(context).log_prob(y.float().flatten(1)) + log_det.float()

    def sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        """By zuko."""
        torch.manual_seed(0)
        y = self._given(context).sample((num_samples,) if context is None else ())
        return self.data.transform.inverse(y.view(num_samples, *self.data.event_shape))

    def _given(self, context: Tensor | None) -> torch.distributions.Distribution:
        if context is None:
            return self.model()
        return self.model(self.data.context_transform(context)[0])


class FlowMatching(Peer):
    """A network of ours by flow_matching: its path and objective, its likelihood along one adaptive solve.

    The divergence is exact where a product a dimension can be paid for, else of one probe that is fixed for the solve.
    """

    validations = 1  # after the last step: those of ours are cheaper

    def __init__(self, model: nn.Module, data: TensorDataModule, config: DictConfig) -> None:
        super().__init__(model, data)
        self.rate = config.task.optimizer.lr
        self.rtol, self.atol = config.evaluation.solver.rtol, config.evaluation.solver.atol
        self.base = Independent(Normal(torch.zeros(self.size), 1.0), 1)

    @property
    def size(self) -> int:
        """D."""
        return math.prod(self.data.event_shape)

    def loss(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The squared distance to the velocity of straight paths from independent noise."""
        y = self.data.transform(x)[0].float()
        at = CondOTProbPath().sample(t=torch.rand(len(y)), x_0=torch.randn_like(y), x_1=y)
        return (self.model(at.t, at.x_t) - at.dx_t).square().mean()

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """By its `ODESolver`; vectors, since of images its exact divergence is another number."""
        y, log_det = self.data.transform(x)
        options = {"method": "dopri5", "rtol": self.rtol, "atol": self.atol, "exact_divergence": self.size <= EXACT}
        y = y.float().flatten(1)
        return ODESolver(_Flat(self)).compute_likelihood(y, self.base.log_prob, None, **options)[1] + log_det.float()

    def sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        """By its `ODESolver`."""
        noise = torch.randn(num_samples, self.size, generator=torch.Generator().manual_seed(0))
        y = ODESolver(_Flat(self)).sample(noise, None, "dopri5", atol=self.atol, rtol=self.rtol)
        return self.data.transform.inverse(y.view(num_samples, *self.data.event_shape))


class _Flat(ModelWrapper):
    """The velocity as flow_matching calls it, of vectors."""

    def __init__(self, peer: FlowMatching) -> None:
        super().__init__(peer.model)
        self.peer = [peer]

    def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
        """See `FlowMatching`."""
        (peer,) = self.peer
        peer.evaluations += 1
        return self.model(t, x.view(len(x), *peer.data.event_shape)).flatten(1)


def spline_flow(features: int, context: int, width: int) -> nn.Module:
    """A neural spline flow (Durkan et al. 2019) of three autoregressive transforms, zuko's default."""
    return zuko.flows.NSF(features, context, transforms=3, hidden_features=(width, width))


def continuous_flow(features: int, context: int, width: int) -> nn.Module:
    """FFJORD, trained with one probe, which is faster than exact."""
    return zuko.flows.CNF(features, context, hidden_features=(width,) * 3, activation=nn.SiLU, exact=False)


def _network(config: DictConfig, data: TensorDataModule, size: int) -> FlowMatching:
    described = OmegaConf.to_container(config.network, resolve=True)
    return FlowMatching(build_network(described, tuple(data.event_shape), data.context_features), data, config)


# What makes a peer of a run's config, its data and the number of ours' parameters.
PEERS: dict[str, Callable[[DictConfig, TensorDataModule, int], Peer]] = {
    "zuko_nsf": lambda config, data, size: Zuko(of_size(spline_flow, data, size), data, 2e-3),
    "zuko_cnf": lambda config, data, size: Zuko(of_size(continuous_flow, data, size), data, 5e-3),
    "flow_matching": _network,
}


def of_size(make: Callable[[int, int, int], nn.Module], data: TensorDataModule, size: int) -> nn.Module:
    """The flow whose number of parameters is nearest to `size`, of widths that are multiples of 8."""
    features = math.prod(data.event_shape)
    flows = (make(features, data.context_features, width) for width in itertools.count(8, 8))
    best = next(flows)
    for flow in flows:
        if abs(parameters(flow) - size) >= abs(parameters(best) - size):
            return best
        best = flow
    raise AssertionError


def train(peer: Peer, batches: Iterator[Batch], seconds: float, decay: float) -> int:
    """Train for so many seconds, validations included; the model gets the best averaged weights. Returns the steps.

    As ours: AdamW, a cosine schedule, gradients clipped to a norm of 1, averaged weights. A batch that makes the gradient
    infinite is left out.
    """
    model = peer.model
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.AdamW(model.parameters(), peer.rate, weight_decay=0.0)
    best, state, steps, validations = math.inf, model.state_dict(), 0, 0
    started = time.perf_counter()
    while (share := (time.perf_counter() - started) / seconds) < 1 or not validations:
        for group in optimizer.param_groups:
            group["lr"] = peer.rate * (1 + math.cos(math.pi * min(share, 1))) / 2
        optimizer.zero_grad()
        peer.loss(*parts_of(next(batches))[:2]).backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            optimizer.step()
            average.update_parameters(model)
        steps += 1
        if share * peer.validations >= validations + 1 or share >= 1:
            validations += 1
            averaged = copy.copy(peer)
            averaged.model = copy.deepcopy(average.module)
            nll = validation(averaged.evaluating())
            if nll < best:
                best, state = nll, {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    model.load_state_dict(state)
    return steps


@torch.no_grad()
def validation(peer: Peer) -> float:
    """The mean of -log p over the validation rows."""
    parts = [-peer.log_prob(*parts_of(batch)[:2]) for batch in peer.data.val_dataloader()]
    return torch.cat(parts).mean().item()


def endless(data: TensorDataModule) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    while True:
        yield from data.train_dataloader()


def main(name: str, folder: str, out: str, measure: str = "") -> None:
    """Train, test and measure a peer; write what it reaches."""
    config, ours = run_config(Path(folder)), run_results(Path(folder))
    torch.manual_seed(ours["seed"])
    data = run_data(config)
    peer = PEERS[name](config, data, parameters(Ours(Path(folder)).model))
    started = time.perf_counter()
    steps = train(peer, endless(data), ours["seconds"], config.callbacks.average.decay)
    seconds = time.perf_counter() - started
    metrics = tested(peer.evaluating())
    if peer.evaluations:
        metrics["nfe"] = peer.evaluations / len(data.test_dataloader())
    if measure:
        metrics |= MEASURES[measure](peer)
    versions = {module.__name__: module.__version__ for module in (zuko, flow_matching, torch)}
    result = {"metrics": metrics, "seconds": seconds, "steps": steps, "parameters": parameters(peer.model)}
    Path(out).write_text(json.dumps(result | {"versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
