"""From several threads at once: the same numbers, of shared estimators, modules and flows."""

import threading

import pytest
import torch
from torch import Generator, nn

from divflow.divergence import Autograd, Exact, Hutchinson, XTrace, check_field, value_and_divergence
from divflow.flow import ContinuousFlow
from divflow.networks import MLP
from divflow.operators import laplacian
from divflow.solver import Solver

_THREADS = 4


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 12)

    def forward(self, t, x):
        q, k, v = self.inner(x).unflatten(1, (3, 2, 2)).unbind(1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1) * x


def _calls():
    """Functions of a seed, over objects that all threads share; each makes tensors."""
    mlp, attention = MLP(4), _Attention()
    flow = ContinuousFlow(mlp, 4, solver=Solver("rk4", options={"step_size": 0.25}))
    noisy = flow.replace(estimator=Hutchinson(2))
    estimators = [Exact(), Exact("reverse", 2), Exact("forward"), Autograd()]

    def x(seed):
        return torch.randn(3, 4, generator=Generator().manual_seed(seed))

    def gradient(seed):
        point = x(seed).requires_grad_()
        return torch.autograd.grad(value_and_divergence(mlp, 0.3, point).divergence.sum(), point)[0]

    def of_new_field(seed):
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        for parameter in net.parameters():
            parameter.data = torch.randn(parameter.shape, generator=Generator().manual_seed(seed))
        check_field(lambda t, x: net(x), 0.0, x(seed))
        return value_and_divergence(lambda t, x: net(x), 0.0, x(seed)).divergence

    return [
        *(lambda seed, e=e, n=n: e(n, 0.3, x(seed)).divergence for e in estimators for n in (mlp, attention) if n is mlp or e.__class__ is not Exact or e.method != "forward"),
        *(lambda seed, e=e: e(attention, 0.3, x(seed), Generator().manual_seed(seed)).divergence for e in (Hutchinson(3), XTrace(4))),
        gradient,
        of_new_field,
        lambda seed: laplacian(lambda z: z.sin().prod(1), x(seed)),
        lambda seed: flow.log_prob(x(seed)),
        lambda seed: noisy.log_prob(x(seed), generator=Generator().manual_seed(seed)),
        lambda seed: flow.sample(3, generator=Generator().manual_seed(seed)),
        lambda seed: flow.decode(flow.encode(x(seed))),
    ]  # fmt: skip


@pytest.mark.parametrize("rounds", [6, pytest.param(100, marks=pytest.mark.fuzz)])
def test_threads_get_the_numbers_that_one_gets(rounds):
    calls = _calls()
    torch.manual_seed(0)
    expected = [[call(seed) for call in calls] for seed in range(rounds)]
    faults, barrier = [], threading.Barrier(_THREADS)

    def work(number):
        barrier.wait()
        for i in range(rounds * len(calls)):
            seed, which = divmod((i + number * 7) % (rounds * len(calls)), len(calls))
            try:
                torch.testing.assert_close(calls[which](seed), expected[seed][which], rtol=1e-4, atol=1e-5)
            except Exception as error:
                faults.append((number, which, seed, repr(error)[:300]))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not faults, [fault[1:] for fault in faults][:5]
