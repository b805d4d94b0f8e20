"""Score-matching objectives: one scale, one expectation, one minimiser."""

import functools
import itertools

import pytest
import torch
from covering import alternated
from gaussian_scores import Gaussian, LinearScore, SmoothScore
from torch import nn

from divflow.divergence import Autograd, Exact, FieldError, Hutchinson, HutchPlusPlus
from divflow.score.field import as_field
from divflow.score.objectives import (
    DenoisingScoreMatching,
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    Objective,
    SlicedScoreMatching,
)

EVENTS = [(4,), (3, 2, 2)]
OF_THE_DATA = {
    "implicit": ImplicitScoreMatching(),
    "implicit autograd": ImplicitScoreMatching(Autograd()),
    "implicit hutchinson": ImplicitScoreMatching(Hutchinson(2)),
    "implicit hutch++": ImplicitScoreMatching(HutchPlusPlus(3)),
    "sliced": SlicedScoreMatching(),
    "sliced gaussian": SlicedScoreMatching(3, "gaussian"),
    "sliced sphere": SlicedScoreMatching(2, "sphere"),
    "sliced vr": SlicedScoreMatching(variance_reduction=True),
    "sliced vr gaussian": SlicedScoreMatching(2, "gaussian", variance_reduction=True),
    "finite difference": FiniteDifferenceScoreMatching(step=1e-4),
    "finite difference vr": FiniteDifferenceScoreMatching(2, "sphere", variance_reduction=True, step=1e-4),
}
OF_NOISY_DATA = {
    "denoising": DenoisingScoreMatching(0.5),
    "denoising weighted": DenoisingScoreMatching(0.5, weighting="sigma2"),
    "denoising of equal levels": DenoisingScoreMatching([0.5, 0.5]),
}
OBJECTIVES = OF_THE_DATA | OF_NOISY_DATA


def within(values, expected, errors=5.0):
    """Whether the mean of rows of values is the expected one, up to standard errors, entry by entry."""
    error = values.std(dim=0) / len(values) ** 0.5
    return ((values.mean(dim=0) - expected).abs() <= errors * error + 1e-9).all()


def gradients(objective, score, x, generator, batches=100, offset=None):
    """The gradients of batches of x, `(batches, n)`; `offset` is subtracted from the losses."""
    rows = []
    for part in x.chunk(batches):
        score.zero_grad()
        loss = objective(score, part, generator=generator).mean()
        if offset is not None:
            loss = loss - offset(score, part, generator=generator).mean()
        loss.backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in score.parameters()]))
    return torch.stack(rows)


@alternated(name=[name for name in OBJECTIVES if name != "implicit autograd"], event=EVENTS)
def test_the_minimiser_is_the_true_score(name, event):
    """The losses are convex in a linear score: the gradient vanishes at the true one, and not beside it."""
    data, noise = Gaussian(event), 0.25 if name in OF_NOISY_DATA else 0.0
    size = len(data.mean)
    covariance = data.covariance + noise * torch.eye(size, dtype=torch.float64)
    x, generator = data.sample(8_000), torch.Generator().manual_seed(3)
    truth = LinearScore(torch.linalg.inv(covariance), data.mean)
    assert within(gradients(OBJECTIVES[name], truth, x, generator), 0.0)
    wrong = LinearScore(1.2 * torch.linalg.inv(covariance), data.mean + 0.1)
    assert not within(gradients(OBJECTIVES[name], wrong, x, generator), 0.0)


@alternated(name=[name for name in OF_THE_DATA if name != "implicit"], event=EVENTS)
def test_agrees_with_implicit_in_expectation_and_gradient(name, event):
    x, score = Gaussian(event).sample(8_000), SmoothScore(event)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        difference = OBJECTIVES[name](score, x, generator=generator) - OBJECTIVES["implicit"](score, x)
    assert difference.std() > 1e-9 or name == "implicit autograd"
    assert within(difference, 0.0)
    assert within(gradients(OBJECTIVES[name], score, x, generator, offset=OBJECTIVES["implicit"]), 0.0)


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_implicit_is_its_formula(event):
    x, score = Gaussian(event).sample(5), SmoothScore(event)
    for b in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda z: score(0.0, z), x[b : b + 1]).reshape(x[b].numel(), -1)
        expected = jacobian.trace() + score(0.0, x[b : b + 1]).square().sum() / 2
        torch.testing.assert_close(ImplicitScoreMatching()(score, x)[b], expected)


@pytest.mark.parametrize("variance_reduction", [False, True])
def test_sliced_is_its_formula(variance_reduction):
    x, score = Gaussian((4,)).sample(6), SmoothScore((4,))
    objective = SlicedScoreMatching(3, "gaussian", variance_reduction)
    losses = objective(score, x, generator=torch.Generator().manual_seed(0))
    slices = Hutchinson(3, "gaussian").freeze(x, torch.Generator().manual_seed(0)).probes
    value = score(0.0, x)
    total = torch.zeros(6, dtype=torch.float64)
    for v in slices:
        _, product = torch.autograd.functional.jvp(lambda z: score(0.0, z), x, v)
        norm = value.square().sum(dim=1) if variance_reduction else (v * value).sum(dim=1).square()
        total = total + (v * product).sum(dim=1) + norm / 2
    torch.testing.assert_close(losses, total / 3)


@pytest.mark.parametrize("variance_reduction", [False, True])
@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_finite_difference_converges_to_sliced_at_second_order(event, variance_reduction):
    x, score = Gaussian(event).sample(50), SmoothScore(event)

    def losses(objective):
        return objective(score, x, generator=torch.Generator().manual_seed(0)).detach()

    limit = losses(SlicedScoreMatching(2, "rademacher", variance_reduction))
    steps = [0.04, 0.02, 0.01]
    errors = [
        (losses(FiniteDifferenceScoreMatching(2, "rademacher", variance_reduction, step)) - limit).abs().max()
        for step in steps
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.8 < coarse / fine < 4.2


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_sliced_with_variance_reduction_varies_less(event):
    """By what the slices of the norm add: measured over slices at fixed data."""
    x, score = Gaussian(event).sample(20), SmoothScore(event)
    generator = torch.Generator().manual_seed(0)

    def variance(reduced):
        objective = SlicedScoreMatching(variance_reduction=reduced)
        with torch.no_grad():
            return torch.stack([objective(score, x, generator=generator) for _ in range(800)]).var(dim=0)

    assert variance(True).mean() < 0.8 * variance(False).mean()


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_denoising_is_implicit_at_the_noisy_data(event):
    """E[denoising] = E[implicit at x + sigma n] + D / (2 sigma^2), for every sigma; gradients too."""
    x, score, sigma = Gaussian(event).sample(40_000), SmoothScore(event), 0.5
    size = x[0].numel()
    generator = torch.Generator().manual_seed(5)
    noisy = x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    with torch.no_grad():
        left = DenoisingScoreMatching(sigma)(score, x, generator=generator)
        right = ImplicitScoreMatching()(score, noisy) + size / (2 * sigma**2)
    assert within(left - right, 0.0)
    difference = gradients(DenoisingScoreMatching(sigma), score, x, generator) - gradients(
        ImplicitScoreMatching(), score, noisy, generator
    )
    assert within(difference, 0.0)


def test_denoising_tends_to_implicit_as_sigma_vanishes():
    """The difference of two scores' losses, in which the constant cancels, tends to that of the data."""
    x = Gaussian((4,)).sample(60_000)
    a, b = SmoothScore((4,)), LinearScore(torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))

    def difference(objective):
        with torch.no_grad():  # the same noise for both, so that most of what it adds cancels
            return torch.cat(
                [
                    objective(a, part, generator=torch.Generator().manual_seed(i))
                    - objective(b, part, generator=torch.Generator().manual_seed(i))
                    for i, part in enumerate(x.split(1_000))
                ]
            )

    limit = difference(ImplicitScoreMatching()).mean()
    biases = []
    for sigma in (1.0, 0.5, 0.1):
        values = difference(DenoisingScoreMatching(sigma))
        biases.append(((values.mean() - limit).abs(), values.std() / len(values) ** 0.5))
    assert biases[0][0] > biases[1][0] > 10 * biases[1][1]
    assert biases[2][0] < 5 * biases[2][1] + 0.02 * biases[0][0]


def test_several_levels_are_the_scores_time():
    seen = []

    def score(t, x):
        seen.append(t)
        return -x

    x = torch.randn(2_000, 3)
    DenoisingScoreMatching([1.0, 0.1, 0.01])(score, x)
    assert seen[0].shape == (2_000,)
    assert set(seen[0].tolist()) == {torch.tensor(level).item() for level in (1.0, 0.1, 0.01)}
    counts = [(seen[0] == torch.tensor(level)).sum().item() for level in (1.0, 0.1, 0.01)]
    assert min(counts) > 500


@pytest.mark.parametrize("name", OBJECTIVES)
def test_laws(name):
    """Shape, dtype, generator, grad modes, empty batches, a time, scores without one, arguments left alone."""
    objective = OBJECTIVES[name]
    for event in ((3,), (2, 1, 3), ()):
        x = torch.randn(5, *event)
        before = x.clone()

        losses = [objective(score, x, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
        assert torch.equal(*losses)
        assert losses[0].shape == (5,)
        assert losses[0].dtype == torch.float32
        assert not losses[0].requires_grad
        assert torch.equal(x, before)
        assert not x.requires_grad
        assert objective(score, x.double()).dtype == torch.float64
        if name != "implicit hutch++":
            assert objective(score, x[:0]).shape == (0,)
        with torch.inference_mode():
            same = objective(score, torch.randn(5, *event), generator=torch.Generator().manual_seed(0))
        assert torch.isfinite(same).all()
        if name == "denoising of equal levels":
            continue  # whose time is the level
        free = objective(lambda x: torch.sin(x), x, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(free, losses[0])
        for t in (1.0, torch.tensor(1.0)):
            later = objective(score, x, t, torch.Generator().manual_seed(0))
            assert not torch.allclose(later, losses[0])
        if event:
            times = torch.linspace(0, 1, 5)
            spread = objective(score, x, times, torch.Generator().manual_seed(0))
            torch.testing.assert_close(spread[0], losses[0][0])
            torch.testing.assert_close(spread[-1], later[-1])


def score(t, x):
    return torch.sin(x) * (1 + t.reshape(-1, *[1] * (x.ndim - 1)))


def test_a_sequential_network_is_a_score():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    loss = ImplicitScoreMatching()(net, torch.randn(4, 3)).mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in net[0].parameters())


@pytest.mark.parametrize(
    "score",
    [
        lambda x, scale=1.0: -x / scale,
        lambda x, context=None: -x,
        lambda t, x: -x,
        lambda *arguments: -arguments[1],
        lambda t, x, context=None: -x,
        lambda t=0.0, x=None: -x,
        functools.partial(lambda scale, x: -x / scale, 1.0),
        torch.compile(nn.Sequential(nn.Identity()), backend="eager"),
    ],
)
def test_which_arguments_a_score_takes(score):
    x = torch.randn(3, 2)
    expected = -x if not isinstance(score, nn.Module) else x
    torch.testing.assert_close(as_field(score)(torch.tensor(7.0), x), expected)


def test_scores_that_work_in_place_leave_the_data_alone():
    for objective in (DenoisingScoreMatching(0.1), FiniteDifferenceScoreMatching()):
        x = torch.ones(3, 2)
        losses = [
            objective(score, x, generator=torch.Generator().manual_seed(0))
            for score in (lambda t, x: x.mul_(-1.0), lambda t, x: -x)
        ]
        assert torch.equal(*losses)
        assert torch.equal(x, torch.ones(3, 2))


def test_finite_differences_turn_autocast_off():
    net, x = nn.Linear(3, 3), torch.randn(4, 3)
    objective = FiniteDifferenceScoreMatching()
    plain = objective(net, x, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(objective(net, x, generator=torch.Generator().manual_seed(0)), plain)


def test_an_objective_of_ones_own():
    class Doubled(Objective):
        def loss(self, score, t, x, generator=None, conditional_score=None):
            return 2 * score(t, x).square().flatten(1).sum(dim=1)

    torch.testing.assert_close(Doubled()(lambda t, x: x, torch.ones(2, 3)), torch.full((2,), 6.0))


def good(t, x):
    return -x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SlicedScoreMatching(0), ValueError, "num_slices.*at least 1.*0"),
        (lambda: SlicedScoreMatching(1.5), ValueError, r"num_slices.*1\.5"),
        (lambda: SlicedScoreMatching(1, "rademaker"), ValueError, "rademaker"),
        (lambda: FiniteDifferenceScoreMatching(0), ValueError, "num_slices.*0"),
        (lambda: FiniteDifferenceScoreMatching(step=-0.1), ValueError, r"step.*-0\.1"),
        (lambda: DenoisingScoreMatching(-0.5), ValueError, r"noise level.*positive.*-0\.5"),
        (lambda: DenoisingScoreMatching([0.5, 0.0]), ValueError, r"noise level.*positive.*0\.0"),
        (lambda: DenoisingScoreMatching([]), ValueError, "at least one"),
        (lambda: DenoisingScoreMatching(float("nan")), ValueError, "nan"),
        (lambda: DenoisingScoreMatching(0.5, weighting="sigma"), ValueError, "'sigma'"),
        (lambda: DenoisingScoreMatching()(good, torch.ones(2, 2)), ValueError, r"no noise level.*sigma=0\.1"),
        (
            lambda: DenoisingScoreMatching().loss(good, torch.tensor(0.0), torch.ones(2, 2)),
            ValueError,
            "conditional_score",
        ),
        (lambda: DenoisingScoreMatching([1.0, 0.1])(good, torch.ones(2, 2), 0.5), ValueError, "Leave t out"),
        *[
            (lambda o=o: o(good, torch.ones(2, 2).long()), FieldError, "int64.*float")
            for o in (ImplicitScoreMatching(), SlicedScoreMatching(), DenoisingScoreMatching(0.1))
        ],
        *[
            (lambda o=o: o(lambda t, x: x[:, :1], torch.ones(3, 2)), FieldError, r"\(3, 1\).*\(3, 2\)")
            for o in (
                ImplicitScoreMatching(),
                ImplicitScoreMatching(Exact("forward")),
                SlicedScoreMatching(),
                FiniteDifferenceScoreMatching(),
                DenoisingScoreMatching(0.1),
            )
        ],
        (lambda: ImplicitScoreMatching()(good, torch.ones(2, 2), torch.ones(3)), FieldError, r"\(2,\).*\(3,\)"),
        (lambda: SlicedScoreMatching(2.0), ValueError, r"num_slices.*2\.0"),
        (lambda: DenoisingScoreMatching("0.1"), ValueError, "'0.1'"),
        (lambda: FiniteDifferenceScoreMatching()(good, torch.ones(2, 2).bfloat16()), FieldError, "bfloat16.*noise"),
        (
            lambda: ImplicitScoreMatching()(torch.sin, torch.ones(2, 2)),
            FieldError,
            "it is not clear whether.*lambda t, x",
        ),
        (lambda: ImplicitScoreMatching()(3, torch.ones(2, 2)), FieldError, "it is not clear whether.*3"),
        (lambda: ImplicitScoreMatching()(good, [1.0]), FieldError, "list"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
