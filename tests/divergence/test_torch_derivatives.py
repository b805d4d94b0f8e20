"""Derivatives of torch's own operations against central differences: what a divergence, its gradient and its Hessian rest on.

For every operation of torch's database the first derivative, the second and the third, contracted with random vectors: those
of a field's value, of its divergence, and of the divergence of a gradient that is trained. What is wrong is listed here and in
`docs/derivatives.md`; anything else that is found is a new fault of torch, or one that it has mended.
"""

import re
from pathlib import Path

import pytest
import torch
from torch_samples import OPERATIONS, functions, name_of, verdict

from divflow.divergence import FieldError, check_field

# By order and operation, of torch 2.13.
WRONG = {
    1: {
        "as_strided_scatter",
        "native_layer_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_with_update",
        "nn.functional.max_unpool1d",
        "nn.functional.max_unpool2d",
        "nn.functional.max_unpool3d",
        "nn.functional.embedding",
    },
    2: {"nn.functional.linear_cross_entropy.chunked", "nn.functional.linear_cross_entropy.chunked_none"},
    3: set(),
}
NOT_FINITE = {2: {"masked.logaddexp"}, 3: {"logcumsumexp", "linalg.norm.subgradients_at_zero"}}
REFUSED = {
    "cdist",
    "native_layer_norm",
    "nn.functional.multi_margin_loss",
    "nn.functional.multilabel_margin_loss",
    "nn.functional.hardsigmoid",
    "nn.functional.embedding_bag",
    "nn.functional.pdist",
    "_segment_reduce.lengths",
    "_segment_reduce.offsets",
}
OF_SYMMETRIC_MATRICES = {
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "linalg.cholesky",
    "linalg.cholesky_ex",
    "linalg.eigh",
    "linalg.eigvalsh",
    "linalg.pinv.hermitian",
}
NORMALIZATIONS = {
    "native_layer_norm",
    "nn.functional.layer_norm",
    "native_batch_norm",
    "nn.functional.batch_norm",
    "nn.functional.instance_norm",
    "nn.functional.group_norm",
    "nn.functional.rms_norm",
}


def found(operations, most, symmetric=True):
    """Verdicts by (order, verdict), the operations of which a sample has each, and the number of samples."""
    verdicts, samples = {}, 0
    for op in operations:
        for function, x in functions(op, most, symmetric):
            samples += 1
            for order in (1, 2, 3):
                it = verdict(function, x, order).split(":")[0]
                verdicts.setdefault((order, it), set()).add(name_of(op))
                if it == "refused":
                    break
    return verdicts, samples


def named(*names):
    return [op for op in OPERATIONS if name_of(op) in names or op.name in names]


ON_213 = torch.__version__.startswith("2.13")


@pytest.mark.filterwarnings("ignore")
def test_third_derivatives_of_normalizations_are_right():
    verdicts, _ = found(named(*NORMALIZATIONS), most=1)
    assert (3, "wrong") not in verdicts
    assert NORMALIZATIONS - {"native_layer_norm", "native_batch_norm"} <= verdicts[3, "right"]


@pytest.mark.filterwarnings("ignore")
def test_factorizations_are_differentiated_as_functions_of_symmetric_matrices():
    operations = named("cholesky", "linalg.eigvalsh")
    assert (1, "wrong") not in found(operations, most=1)[0]
    if ON_213:
        assert found(operations, most=1, symmetric=False)[0][1, "wrong"] == {"cholesky", "linalg.eigvalsh"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_of_torchs_operations():
    verdicts, samples = found(OPERATIONS, most=4)
    for (order, it), names in sorted(verdicts.items()):
        print(order, it, len(names), sorted(names) if it != "right" else "")
    assert samples > 1500
    for order in (1, 2, 3):
        assert verdicts.get((order, "wrong"), set()) <= WRONG[order]
        assert verdicts.get((order, "not finite"), set()) <= NOT_FINITE.get(order, set())
        if ON_213:
            assert verdicts.get((order, "wrong"), set()) == WRONG[order]
    assert verdicts[2, "refused"] <= REFUSED
    if ON_213:
        operations = named(*OF_SYMMETRIC_MATRICES)
        assert found(operations, most=3, symmetric=False)[0][1, "wrong"] == OF_SYMMETRIC_MATRICES


def test_the_documentation_names_them():
    text = (Path(__file__).parents[2] / "docs" / "derivatives.md").read_text()
    for name in {*WRONG[1], *WRONG[2], *NOT_FINITE[2], *NOT_FINITE[3], *REFUSED, *OF_SYMMETRIC_MATRICES}:
        short = re.sub(
            r"^(nn\.functional|linalg)\.|\.(chunked|chunked_none|lengths|offsets|hermitian|subgradients_at_zero)$",
            "",
            name,
        )
        assert short.split(".")[-1] in text, name


def test_a_field_with_a_wrong_derivative_is_refused_before_it_is_trained():
    def unpooled(t, x):
        chosen = torch.tensor([[[0, 1, 1]]]).expand(len(x), 1, 3)  # one entry twice, as windows that overlap choose it
        return torch.nn.functional.max_unpool1d(x[:, None], chosen, 1, 1)[:, 0] * x

    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FieldError, match="the gradient of the field's value is wrong"):
        check_field(unpooled, 0.0, x, gradient=True)
