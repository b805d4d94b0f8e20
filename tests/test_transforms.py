import math

import pytest
import torch
from hydra.utils import instantiate

from divflow.data import Affine, Bounded, Compose, Logit
from divflow.operators import jacobian

TRANSFORMS = {
    "affine": Affine(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.1, 3.0])),
    "scalar affine": Affine(0.5, 4.0),
    "logit": Logit(0.05),
    "bounded": Bounded([0.0, -1.0, None], [1.0, None, 2.0]),
    "bounded by numbers": Bounded(-0.5, 3.0),
    "without bounds": Bounded([None], [None]),
    "composed": Compose([Logit(0.01), Affine([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inverse_log_determinant_and_config(name):
    transform = TRANSFORMS[name]
    x = torch.rand(5, 3, dtype=torch.float64)
    y, log_det = transform(x)
    torch.testing.assert_close(transform.inverse(y), x)
    matrices = jacobian(lambda t, x: transform(x)[0], 0.0, x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(matrices).logabsdet)
    rebuilt = instantiate(transform.config(), _convert_="all")
    torch.testing.assert_close(rebuilt(x)[0], y)


def test_standardization_of_large_numbers_keeps_their_digits():
    """Seconds since 1970: float32 would know them to two minutes only."""
    x = 1.7e9 + torch.arange(5.0, dtype=torch.float64)[:, None]
    y, _ = Affine(x.mean(dim=0), x.std(dim=0))(x)
    torch.testing.assert_close(y.std(), torch.tensor(1.0, dtype=torch.float64))


def test_image_shaped():
    shift, x = torch.rand(1, 2, 2), torch.rand(3, 1, 2, 2)
    y, log_det = Affine(shift, torch.full((1, 2, 2), 2.0))(x)
    torch.testing.assert_close(y, (x - shift) / 2)
    torch.testing.assert_close(log_det, torch.full((3,), -4 * torch.tensor(2.0).log()))


@pytest.mark.parametrize("margin", [0.0, 0.5, -1.0])
def test_logit_margin(margin):
    with pytest.raises(ValueError, match=f"margin.*{margin}"):
        Logit(margin)


def test_what_is_uniform_between_bounds_becomes_logistic():
    y, log_det = Bounded([-3.0], [5.0])(8 * torch.tensor([[0.25], [0.5], [0.9]]) - 3)
    torch.testing.assert_close(y.squeeze(1), torch.tensor([-math.log(3), 0.0, math.log(9)]))
    density = y.sigmoid() * (-y).sigmoid()  # of the logistic distribution
    torch.testing.assert_close(density.squeeze(1).log() + log_det, torch.full((3,), -math.log(8)))


def test_beyond_a_bound_the_density_is_zero():
    x = torch.tensor([[0.5, 2.0, 9.0], [0.0, 2.0, 9.0], [0.5, -1.0, 9.0], [1.5, 2.0, 9.0]], requires_grad=True)
    y, log_det = Bounded([0.0, -1.0, None], [1.0, None, None])(x)
    assert y.isfinite().all()
    assert log_det.isneginf().tolist() == [False, True, True, True]
    (gradient,) = torch.autograd.grad(log_det[0] + y.sum(), x)
    assert gradient.isfinite().all()
    y, _ = Bounded([0.0], [1.0])(torch.tensor([[math.nan]]), values=False)
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rounding_takes_samples_out_of_the_bounds(dtype):
    bounded = Bounded([0.1, -0.3, None], [0.7, None, 0.9])
    y = torch.tensor([[100.0, -100.0, 100.0], [-800.0, -800.0, 800.0], [0.0, 80.0, -80.0]], dtype=dtype)
    y.requires_grad_()
    x = bounded.inverse(y)
    assert (x > bounded.low).all()
    assert (x < bounded.high).all()
    assert bounded(x)[1].isfinite().all()
    (gradient,) = torch.autograd.grad(x.sum(), y)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("low", "high"), [([0.0, 1.0], [1.0, 1.0]), (2.0, -1.0), ([math.nan], [None])])
def test_bounds_that_are_none(low, high):
    with pytest.raises(ValueError, match=r"each low must lie below its high, but they are"):
        Bounded(low, high)
