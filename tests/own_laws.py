"""Laws of networks that know their own divergence, and of networks of particles."""

import torch

from divflow.divergence import Autograd, Exact, value_and_divergence

TIMES = [torch.tensor(0.4, dtype=torch.float64), torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)]


def perturbed(network, scale=0.3, seed=0):
    """In float64, with parameters of which none is zero, so that nothing is hidden."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double()
    for parameter in network.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network


def states(*event, k=3, seed=1):
    return torch.randn(k, *event, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def derivatives(g, t, x, estimator):
    """Value, divergence, and their first and second derivatives in t, x and the parameters."""
    t, x = t.clone().requires_grad_(), x.clone().requires_grad_()
    inputs = [t, x, *g.parameters()]
    found = value_and_divergence(g, t, x, estimator)
    loss = found.value.sin().sum() + found.divergence.sin().sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(sum(d.sin().sum() for d in first), inputs, materialize_grads=True)
    return [*found, *first, *second]


def assert_own_divergence_is_exact(network, t, x):
    """Value, divergence, first and second derivatives in t, x and parameters, against one product a dimension."""
    assert Exact().explain(network, t, x).method == "own"
    ways = (derivatives(network, t, x, way) for way in (Exact("own"), Autograd()))
    for own, true in zip(*ways, strict=True):
        scale = true.abs().max().item() if true.numel() else 0.0
        torch.testing.assert_close(own, true, rtol=1e-10, atol=1e-10 * (1 + scale))


def assert_euclidean(network, t, x):
    """g(t, x R + a) = g(t, x) R for rotations and reflections R and translations a."""
    rotation = torch.linalg.qr(states(x.shape[2], x.shape[2])[0])[0]
    for turn in (rotation, -rotation):
        moved = network(t, x @ turn + states(1, x.shape[2], k=1))
        torch.testing.assert_close(moved, network(t, x) @ turn, rtol=1e-10, atol=1e-10)


def assert_permutes(network, t, x, order):
    """g(t, x[:, order]) = g(t, x)[:, order]."""
    torch.testing.assert_close(network(t, x[:, order]), network(t, x)[:, order], rtol=1e-10, atol=1e-10)
