"""Of generated fields no right one is refused or warned of, and cuts are found whatever their share."""

import collections
import warnings

import pytest
import torch
from verification.generated import PERIOD, SHARES, Draw

from divflow.divergence import Exact, FieldError, FieldWarning, Hutchinson, HutchPlusPlus, check_field, divergence

ESTIMATORS = (Exact(), Hutchinson(1), Hutchinson(2, "gaussian"), HutchPlusPlus(3), Exact("reverse"))


def _right(seed: int) -> None:
    draw = Draw(seed, torch.float32 if seed % 2 else torch.float64)
    field, x = draw.right()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", FieldWarning)
        # It is accepted, and said: a spectral normalization in training mode.
        warnings.filterwarnings("ignore", message=".*changes its own state", category=FieldWarning)
        with torch.no_grad() if seed % 3 == 0 else torch.enable_grad():
            for call in range(3):
                divergence(
                    field, 0.5, x, ESTIMATORS[(seed + call) % len(ESTIMATORS)] if draw.size < 100 else Hutchinson()
                )
        check_field(field, 0.5, x)


def _found(seed: int, share: float, dtype: torch.dtype) -> bool:
    field, x = Draw(seed, dtype).cut(share)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_field(field, 0.5, x)
        except FieldError as error:
            return "autograd does not see all" in str(error)
    return False


@pytest.mark.parametrize("start", range(0, PERIOD, 10))
def test_right_fields_are_left_alone(start):
    for seed in range(start, min(start + 10, PERIOD)):
        _right(seed)


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(0, 2000, 100))
def test_two_thousand_right_fields_are_left_alone(start):
    for seed in range(start, start + 100):
        _right(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_cuts_are_found(share, dtype):
    for seed in range(8):
        assert _found(seed, share, dtype), seed


@pytest.mark.fuzz
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_five_hundred_cuts_are_found(dtype):
    found = collections.Counter(
        share for seed in range(500) for share in [SHARES[seed % 4]] if _found(seed, share, dtype)
    )
    print(dtype, dict(found))
    # A thousandth of the value may be less than a hundred-thousandth of the derivative, which is agreement.
    assert [found[share] for share in SHARES[:3]] == [125, 125, 125]
    assert found[SHARES[3]] >= 124
