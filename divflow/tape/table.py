"""The rules, by the name of the operation, which is the same for a function of torch, a method of Tensor and one of torch.nn.functional."""

from typing import Any

from torch import Tensor

from divflow.tape import reductions
from divflow.tape.elementwise import BatchNorm, Elementwise
from divflow.tape.linear import Layer, Matmul, Multilinear
from divflow.tape.movements import Constant, Copy, Movement
from divflow.tape.operation import Operation, name_of
from divflow.tape.reductions import Determinant, Reduction
from divflow.tape.rule import Rule
from divflow.tape.written import WRITTEN, Standardization, Written, standardize

__all__ = ["CHOOSING", "JOINING", "RESHAPING", "RULES", "SHAPED", "is_local"]

_ELEMENTWISE = """
    add sub rsub subtract mul multiply div divide true_divide rdiv neg negative pow rpow float_power square sqrt rsqrt
    reciprocal abs absolute sign sgn exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan arcsin arccos
    arctan sinh cosh tanh asinh acosh atanh arcsinh arccosh arctanh sinc erf erfc erfinv lgamma digamma logit expit
    xlogy log_ndtr ndtr floor ceil round trunc frac fix clamp clamp_min clamp_max clip nan_to_num where maximum
    minimum fmax fmin atan2 arctan2 hypot lerp addcmul addcdiv logaddexp logaddexp2 masked_fill copysign fmod
    remainder heaviside deg2rad rad2deg sigmoid relu relu6 elu selu celu gelu silu mish softplus softsign tanhshrink
    softshrink hardshrink hardtanh hardsigmoid hardswish leaky_relu prelu rrelu logsigmoid log_sigmoid threshold _threshold
    dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d feature_dropout
""".split()  # noqa: SIM905 - a list of these would take a screen
RESHAPING = "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as".split()  # noqa: SIM905
"""Movements that keep entries in their order."""
JOINING = "cat concat concatenate".split()  # noqa: SIM905
"""Movements that put tensors one after another."""
_MOVEMENTS = """
    ravel transpose swapaxes swapdims permute movedim moveaxis T mT
    getitem narrow select index_select take_along_dim gather split split_with_sizes chunk tensor_split unbind hsplit
    vsplit dsplit stack hstack vstack dstack column_stack expand expand_as
    broadcast_to repeat tile repeat_interleave flip fliplr flipud roll rot90 diagonal unfold atleast_1d atleast_2d
    atleast_3d
""".split()  # noqa: SIM905
_COPIES = [
    "clone",
    "contiguous",
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "type",
    "type_as",
    "positive",
    "alias",
    "requires_grad_",
    "detach_copy",
]
SHAPED = """
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones
    new_full new_empty new_tensor
""".split()  # noqa: SIM905
"""Operations of which an argument's shape alone counts."""
_CONSTANTS = ["detach", "data", *SHAPED]
_MULTILINEAR = """
    bmm mv dot vdot inner outer ger einsum tensordot kron cross linalg_cross vecdot linalg_vecdot cumsum diff trace tril triu
""".split()  # noqa: SIM905
CHOOSING = {*RESHAPING, *_MOVEMENTS} - {"stack", "hstack", "vstack", "dstack", "column_stack"}
"""Movements whose integer arguments, if there are any, are indices and no entries."""

_elementwise, _movement, _copy, _constant, _multilinear, _determinant = (
    Elementwise(), Movement(), Copy(), Constant(), Multilinear(), Determinant(),
)  # fmt: skip
_VARIANCE = ("input", "dim", "unbiased", "keepdim")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys((f"{name}_" for name in _ELEMENTWISE), _elementwise),
    **dict.fromkeys([*RESHAPING, *JOINING, *_MOVEMENTS], _movement),
    **dict.fromkeys(_COPIES, _copy),
    **dict.fromkeys(_CONSTANTS, _constant),
    **dict.fromkeys(_MULTILINEAR, _multilinear),
    **dict.fromkeys(("matmul", "mm"), Matmul()),
    "linear": Layer(matrix=lambda weight: weight if weight.ndim == 2 else None),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), Layer()),
    "batch_norm": BatchNorm(),
    "sum": Reduction(formula=reductions.total),
    "mean": Reduction(formula=reductions.average),
    "var": Reduction(_VARIANCE, reductions.variance),
    "std": Reduction(_VARIANCE, reductions.deviation, kinked=True),
    "logsumexp": Reduction(formula=reductions.log_sum_exp),
    "prod": Reduction(formula=reductions.product),
    **dict.fromkeys(("amax", "amin"), Reduction(flat=True)),
    "norm": Reduction(("input", "p", "dim", "keepdim"), reductions.norm, kinked=True),
    "linalg_vector_norm": Reduction(("x", "ord", "dim", "keepdim"), reductions.norm, kinked=True),
    "linalg_norm": Reduction(("A", "ord", "dim", "keepdim"), reductions.matrix_norm, kinked=True),
    **dict.fromkeys(("slogdet", "logdet", "linalg_slogdet"), _determinant),
    name_of(standardize): Standardization(),
    **{name: Written(function, fused=False) for name, function in WRITTEN.items()},
}

# Besides elementwise functions and movements, operations through which a NaN shows what is seen, whatever the numbers.
_LOCAL = {
    *_ELEMENTWISE, *RESHAPING, *JOINING, *_MOVEMENTS, *_COPIES, *_CONSTANTS,
    *"""
    linear matmul mm sum mean glu batch_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d pad
    avg_pool1d avg_pool2d avg_pool3d interpolate pixel_shuffle pixel_unshuffle fold softmax log_softmax layer_norm
    group_norm instance_norm rms_norm var std amax amin logsumexp __iter__
    """.split(),  # noqa: SIM905
}  # fmt: skip
# Elementwise ones in which it may vanish.
_HIDING = set(
    """
    where masked_fill fmax fmin nan_to_num pow float_power hypot copysign heaviside sign sgn xlogy alpha_dropout
    feature_alpha_dropout feature_dropout rrelu
    """.split()  # noqa: SIM905
)


_SHOWING = {name for name in _LOCAL if name not in _HIDING}
_SHOWING |= {f"{name}_" for name in _SHOWING}


def is_local(op: Operation) -> bool:
    """Whether a NaN shows at every point what the operation sees."""
    return op.name in _SHOWING or _is_power(op)


def _is_power(op: Operation) -> bool:
    """Of a number other than zero, whose derivative is zero nowhere but at a point."""
    if op.name != "pow" or len(op.args) != 2:
        return False
    exponent: Any = op.args[1]
    return not isinstance(exponent, Tensor) and exponent != 0
