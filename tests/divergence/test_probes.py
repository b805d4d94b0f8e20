"""Orthogonal probes: orthogonal for each sample, and each of them distributed as one alone."""

import itertools
import math

import pytest
import torch

from divflow.divergence import probes
from divflow.divergence.hutchinson import Hutchinson
from divflow.divergence.probes import draw_orthogonal_probes

DISTRIBUTIONS = ["rademacher", "gaussian", "sphere"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("event", "nodes"), [((8,), 5), ((8,), 8), ((7,), 5), ((2, 3), 6), ((1,), 3), ((4,), 10)])
def test_orthogonal_for_each_sample_in_groups_of_d(distribution, event, nodes):
    x = torch.zeros(3, *event, dtype=torch.float64)
    drawn = draw_orthogonal_probes(distribution, 2, nodes, x, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, nodes, *x.shape)
    assert drawn.dtype == x.dtype
    size = math.prod(event)
    for start in range(0, nodes, size):
        group = drawn[:, start : start + size].flatten(3).movedim(2, 1)
        gram = group @ group.mT
        off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
        torch.testing.assert_close(off_diagonal, torch.zeros_like(gram), rtol=0, atol=1e-12 * size)
        if distribution != "gaussian":
            torch.testing.assert_close(gram.diagonal(dim1=-2, dim2=-1).mean(), torch.tensor(float(size)).double())
    if distribution == "rademacher" and size & (size - 1) == 0:
        assert (drawn.abs() == 1).all()


@pytest.mark.parametrize("distribution", ["rademacher", "sphere"])
@pytest.mark.parametrize("size", [4, 5])
def test_d_of_them_give_the_trace_itself(distribution, size):
    matrix = torch.randn(size, size, dtype=torch.float64)
    drawn = draw_orthogonal_probes(distribution, 1, size, torch.zeros(6, size, dtype=torch.float64))[0]
    forms = torch.einsum("nki,ij,nkj->nk", drawn, matrix, drawn)
    torch.testing.assert_close(forms.mean(dim=0), matrix.trace().expand(6))


def test_signed_hadamard_rows_are_exactly_unbiased(monkeypatch):
    """Over all signs, which are equally likely, each row's mean of v v^T is the identity: no draw is needed."""
    size = 4
    signs = torch.tensor(list(itertools.product([-1, 1], repeat=size)))
    monkeypatch.setattr(
        probes, "_rademacher", lambda shape, generator, device: signs.view(1, -1, 1, size).expand(shape)
    )
    drawn = draw_orthogonal_probes("rademacher", 1, size, torch.zeros(2**size, size, dtype=torch.float64))[0]
    for row in drawn:
        torch.testing.assert_close(row.mT @ row / len(signs), torch.eye(size, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [3, 4])
def test_each_has_the_distribution_of_one_alone(distribution, size):
    draws = 40_000
    x = torch.zeros(draws, size, dtype=torch.float64)
    drawn = draw_orthogonal_probes(distribution, 1, size, x)[0]
    alone = Hutchinson(1, distribution if distribution != "rademacher" or size == 4 else "sphere").freeze(x).probes[0]
    for node in drawn:
        products = torch.einsum("ki,kj->kij", node, node)
        error = products.std(dim=0) / math.sqrt(draws)
        assert ((products.mean(dim=0) - torch.eye(size)).abs() < 5 * error + 1e-12).all()
        for power in (2, 4):
            a, b = (probe[:, 0].pow(power) for probe in (node, alone))
            assert abs(a.mean() - b.mean()) <= 5 * (a.var() + b.var()).sqrt() / math.sqrt(draws)
