import numpy as np
import pytest

from divflow.likelihood.gauss_kronrod import gauss_kronrod


@pytest.mark.parametrize("count", [3, 5, 7, 9, 11, 15, 21, 31, 61])
def test_degrees_of_exactness(count):
    rule, n = gauss_kronrod(count), (count - 1) // 2
    assert (np.diff(rule.nodes) > 0).all()
    assert (rule.kronrod_weights > 0).all()
    for degree in range(3 * n + 2):
        assert abs(rule.kronrod_weights @ rule.nodes**degree - 1 / (degree + 1)) < 1e-13
    for degree in range(2 * n):
        assert abs(rule.gauss_weights @ rule.nodes**degree - 1 / (degree + 1)) < 1e-13


def test_published_values_of_the_fifteen_point_rule():
    """QUADPACK, dqk15: nodes and weights on [-1, 1]."""
    rule = gauss_kronrod(15)
    nodes = [
        0.991455371120812639206854697526329,
        0.949107912342758524526189684047851,
        0.864864423359769072789712788640926,
    ]
    weights = [
        0.022935322010529224963732008058970,
        0.063092092629978553290700663189204,
        0.104790010322250183839876322541518,
    ]
    np.testing.assert_allclose(2 * rule.nodes[-3:][::-1] - 1, nodes, rtol=1e-14)
    np.testing.assert_allclose(2 * rule.kronrod_weights[-3:][::-1], weights, rtol=1e-13)
    assert rule.gauss_weights[0] == 0
    np.testing.assert_allclose(2 * rule.gauss_weights[7], 0.417959183673469387755102040816327, rtol=1e-13)


@pytest.mark.parametrize("count", [0, 1, 2, 14])
def test_refuses_other_counts(count):
    with pytest.raises(ValueError, match=f"odd.*{count}"):
        gauss_kronrod(count)
