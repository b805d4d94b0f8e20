import pytest
import torch
from hydra.utils import instantiate

from divflow.data import Affine, Compose, Logit
from divflow.operators import jacobian

TRANSFORMS = {
    "affine": Affine(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.1, 3.0])),
    "scalar affine": Affine(0.5, 4.0),
    "logit": Logit(0.05),
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
