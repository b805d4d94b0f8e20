"""Estimators of a user's own: what they return, and whether they are as random as they say."""

import pytest
import torch

from divflow.divergence import Autograd, Estimator, FieldError, Hutchinson, divergence
from divflow.divergence.estimator import Estimate
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.operators import laplacian

X = torch.randn(5, 2)


def field(t, x):
    return torch.tanh(x.flip(1)) + x


def everywhere(estimator):
    flow = ContinuousFlow(field, 2, estimator=estimator)
    return (
        lambda: divergence(field, 0.0, X, estimator),
        lambda: flow.log_prob(X),
        lambda: flow.replace(likelihood=Augmented()).log_prob(X),
        lambda: flow.replace(likelihood=Quadrature(tolerance=1e-3)).log_prob(X),
        lambda: laplacian(lambda x: (x**2).sum(dim=1), X, estimator),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": lambda x: x.sum()}, r"divergence of shape \(\)"),
        ({"divergence": lambda x: x.sum().view(1)}, r"shape \(1,\)"),
        ({"divergence": lambda x: x.sum(dim=1, keepdim=True)}, r"shape \(\d+, 1\)"),
        ({"divergence": lambda x: x}, r"shape \(\d+, 2\)"),
        ({"divergence": lambda x: 1.0}, "divergence of type float"),
        ({"value": lambda x: x.flatten()}, r"value of shape"),
        ({"standard_error": lambda x: x}, r"standard_error of shape"),
        ({"samples": lambda x: x[:, 0]}, r"samples of shape \(\d+,\).*must be \(m, \d+\)"),
        ({"products": lambda x: x}, r"products of shape.*must be \(m, \d+, 2\)"),
    ],
)
def test_a_result_of_another_shape_is_refused(change, message):
    class Wrong(Estimator):
        def estimate(self, g, t, x, generator=None):
            return Autograd().estimate(g, t, x)._replace(**{name: of(x) for name, of in change.items()})

    for call in everywhere(Wrong()):
        with pytest.raises(FieldError, match=f"Wrong.estimate returned .*{message}"):
            call()


def test_a_pair_is_no_estimate():
    class Pair(Estimator):
        def estimate(self, g, t, x, generator=None):
            return g(t, x), x.sum(dim=1)

    with pytest.raises(FieldError, match="must return an Estimate.*returned a tuple"):
        divergence(field, 0.0, X, Pair())


class Unsaid(Estimator):
    """Random, without a word."""

    def estimate(self, g, t, x, generator=None):
        return Hutchinson().estimate(g, t, x, generator)


def test_an_estimator_that_is_random_and_does_not_say_so_is_noticed_at_its_first_call():
    for call in (it for _ in range(2) for it in everywhere(Unsaid())):  # and again
        with pytest.raises(FieldError, match=r"Unsaid estimated two divergences.*stochastic = True.*freeze"):
            call()


def test_others_are_asked_twice_once():
    class Counted(Estimator):
        calls = 0

        def estimate(self, g, t, x, generator=None):
            Counted.calls += 1
            return Autograd().estimate(g, t, x)

    class Said(Unsaid):
        stochastic = True

    class OfItsField(Counted):
        def estimate(self, g, t, x, generator=None):
            if g is not field:
                raise RuntimeError("of another field")
            return Counted.estimate(self, g, t, x)

    state = torch.get_rng_state()
    for _ in range(3):
        divergence(field, 0.0, X, Counted())
    assert Counted.calls == 5
    assert torch.equal(torch.get_rng_state(), state)
    divergence(field, 0.0, X, Said())
    divergence(field, 0.0, X, OfItsField())


def test_the_parts_that_are_known_pass():
    class Parts(Estimator):
        def estimate(self, g, t, x, generator=None):
            value, known, *_ = Autograd().estimate(g, t, x)
            return Estimate(value, known, 0 * known, known.expand(3, -1), value.expand(3, *value.shape))

    for call in everywhere(Parts()):
        call()
