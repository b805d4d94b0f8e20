"""Patterson's rules: their degrees, their nesting, published values."""

from fractions import Fraction

import numpy as np
import pytest

from divflow.likelihood.patterson import COUNTS, patterson


@pytest.mark.parametrize(("count", "degree", "lesser"), [(7, 11, 5), (15, 23, 11), (31, 47, 23), (63, 95, 47)])
def test_degrees_of_exactness(count, degree, lesser):
    """On polynomials in 2 x - 1, in exact arithmetic, which would see an error of a node's or weight's 16th digit."""
    rule = patterson(count)
    nodes = [2 * Fraction(float(x)) - 1 for x in rule.nodes]
    for weights, highest in ((rule.weights, degree), (rule.lesser_weights, lesser)):
        assert (weights[weights != 0] > 0).all()
        exact = [Fraction(float(weight)) for weight in weights]

        def error(power, exact=exact):
            integral = Fraction(1, power + 1) if power % 2 == 0 else 0
            return abs(float(sum(w * x**power for w, x in zip(exact, nodes, strict=True)) - integral))

        assert max(error(power) for power in range(highest + 1)) < 3e-16
        if count < 20:  # beyond, a monomial of the next degree is integrated nearly to rounding
            assert error(highest + 1) > 1e-9


@pytest.mark.parametrize("count", COUNTS)
def test_every_second_node_is_one_of_the_lesser_rule(count):
    rule = patterson(count)
    assert len(rule.nodes) == len(rule.weights) == count
    assert (np.diff(rule.nodes) > 0).all()
    np.testing.assert_allclose(rule.nodes, 1 - rule.nodes[::-1], rtol=0, atol=2e-16)
    if count > 7:
        lesser = patterson(count // 2)
        np.testing.assert_array_equal(rule.nodes[1::2], lesser.nodes)
        np.testing.assert_array_equal(rule.lesser_weights[1::2], lesser.weights)
    assert not rule.lesser_weights[::2].any()


def test_published_values():
    """Patterson 1968 by way of QUADPACK's and SLATEC's tables (the seven-point rule), and Gauss's three nodes."""
    rule = patterson(7)
    np.testing.assert_allclose(2 * rule.nodes[4:] - 1, [0.43424374934680255800, 0.6**0.5, 0.96049126870802028342])
    np.testing.assert_allclose(2 * rule.weights[3], 0.45091653865847414235, rtol=1e-15)
    np.testing.assert_allclose(2 * rule.weights[6], 0.10465622602646726519, rtol=1e-15)
    np.testing.assert_allclose(rule.lesser_weights[1::2], np.array([5, 8, 5]) / 18, rtol=1e-15)


@pytest.mark.parametrize("count", [3, 5, 8, 127])
def test_refuses_other_numbers(count):
    with pytest.raises(ValueError, match=f"7, 15, 31, 63.*{count}"):
        patterson(count)
