"""The forward Laplacian: value, gradient and Laplacian of a scalar function of each sample, from one pass.

The Laplacian by double backward takes D products with the Hessian, each through the function's graph and its
gradient's. Instead the gradient is carried forward, one tangent a dimension, and with it one second derivative, the
sum over all dimensions (Li et al. 2023, arXiv 2307.08214; Dangel et al. 2025, arXiv 2505.13644):

    u = W x + b:    u' = W x',    u'' = W x''
    y = s(u):       y' = s'(u) u',    y'' = s'(u) u'' + s''(u) sum_i (u'_i)^2

which is about half of the multiplications and no second graph. Any function is followed as it is evaluated
(`divflow.tape`); `reader` carries its derivatives along (`jet`), through a function without a rule by products of its own.
`followed` evaluates, `forward` decides.
"""

from divflow.operators.forward_laplacian.followed import SeveralNumbersError, one_number_a_sample
from divflow.operators.forward_laplacian.forward import ValueGradientLaplacian, explain, value_gradient_laplacian

__all__ = [
    "SeveralNumbersError",
    "ValueGradientLaplacian",
    "explain",
    "one_number_a_sample",
    "value_gradient_laplacian",
]
