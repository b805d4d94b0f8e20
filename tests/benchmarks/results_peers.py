"""Peers of a run, on its split, with about its number of parameters, for its seconds: python results_peers.py NAME RUN OUT [MEASURE]

RUN is the folder of a run of divflow; OUT, a file of JSON, takes what the peer reaches.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import zuko
from results_measures import MEASURES
from results_trained import Ours, Trained, parameters, run_config, run_data, run_results, tested
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from divflow.data.module import Batch, TensorDataModule, split_context

# Evaluations on the validation rows, equally spaced in time; the best one's weights are tested, as ours are.
VALIDATIONS = 8


class Zuko(Trained):
    """A flow of zuko over the transformed data, with the transform's log-determinant."""

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """By zuko."""
        y, log_det = self.data.transform(x)
        y = y.float().flatten(1)
        return (self.model(context) if context is not None else self.model()).log_prob(y) + log_det.float()

    def sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        """By zuko."""
        torch.manual_seed(0)
        y = self.model().sample((num_samples,)) if context is None else self.model(context).sample()
        return self.data.transform.inverse(y.view(num_samples, *self.data.event_shape))


def spline_flow(features: int, context: int, width: int) -> nn.Module:
    """A neural spline flow (Durkan et al. 2019) of three autoregressive transforms, zuko's default."""
    return zuko.flows.NSF(features, context, transforms=3, hidden_features=(width, width))


def continuous_flow(features: int, context: int, width: int) -> nn.Module:
    """FFJORD, trained with one probe, which is faster than exact, and judged exactly (see `judging`)."""
    return zuko.flows.CNF(features, context, hidden_features=(width,) * 3, activation=nn.SiLU, exact=False)


# By name: what makes the flow of a width, and its learning rate.
PEERS: dict[str, tuple[Callable[[int, int, int], nn.Module], float]] = {
    "zuko_nsf": (spline_flow, 2e-3),
    "zuko_cnf": (continuous_flow, 5e-3),
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


def judging(model: nn.Module) -> nn.Module:
    """The model in eval mode, with exact divergences if it is a CNF."""
    if isinstance(model, zuko.flows.CNF):
        model.transform.exact = True
    return model.eval()


def train(peer: Zuko, rate: float, batches: Iterator[Batch], seconds: float, decay: float) -> int:
    """Maximum likelihood for so many seconds, validations included; the model gets the best averaged weights.

    As ours: AdamW, a cosine schedule, gradients clipped to a norm of 1, averaged weights. A batch that makes the gradient
    infinite is left out.
    """
    model = peer.model
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    best, state, steps, judged = math.inf, model.state_dict(), 0, 0
    started = time.perf_counter()
    while (share := (time.perf_counter() - started) / seconds) < 1 or not judged:
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * min(share, 1))) / 2
        optimizer.zero_grad()
        (-peer.log_prob(*split_context(next(batches))).mean()).backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            optimizer.step()
            average.update_parameters(model)
        steps += 1
        if share * VALIDATIONS >= judged + 1 or share >= 1:
            judged += 1
            nll = validation(Zuko(judging(average.module), peer.data))
            if nll < best:
                best, state = nll, {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    model.load_state_dict(state)
    return steps


@torch.no_grad()
def validation(peer: Zuko) -> float:
    """The mean of -log p over the validation rows."""
    parts = [-peer.log_prob(*split_context(batch)) for batch in peer.data.val_dataloader()]
    return torch.cat(parts).mean().item()


def endless(data: TensorDataModule) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    while True:
        yield from data.train_dataloader()


def main(name: str, folder: str, out: str, measure: str = "") -> None:
    """Train, test and measure a peer; write what it reaches."""
    make, rate = PEERS[name]
    config, ours = run_config(Path(folder)), run_results(Path(folder))
    torch.manual_seed(ours["seed"])
    data = run_data(config)
    peer = Zuko(of_size(make, data, parameters(Ours(Path(folder)).model)), data)
    started = time.perf_counter()
    steps = train(peer, rate, endless(data), ours["seconds"], config.callbacks.average.decay)
    seconds = time.perf_counter() - started
    judging(peer.model)
    calls: list[int] = []
    if isinstance(peer.model, zuko.flows.CNF):
        peer.model.transform.ode.register_forward_hook(lambda *_: calls.append(1))
    metrics = tested(peer)
    if calls:
        metrics["nfe"] = len(calls) / len(data.test_dataloader())
    if measure:
        metrics |= MEASURES[measure](peer)
    result = {"metrics": metrics, "seconds": seconds, "steps": steps, "parameters": parameters(peer.model)}
    Path(out).write_text(json.dumps(result | {"versions": {"zuko": zuko.__version__, "torch": torch.__version__}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
