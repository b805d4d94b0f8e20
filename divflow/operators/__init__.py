"""Derivatives of plain functions, per sample and for tensors of any shape.

derivatives         gradients, Jacobians, Hessians and partial derivatives
parameters          derivatives in parameters
laplacians          Laplacians
forward_laplacian   value, gradient and Laplacian from one pass
"""

from divflow.errors import FieldError
from divflow.operators.derivatives import flat_gradient, gradient, hessian, jacobian, partial_derivative
from divflow.operators.laplacians import explain_laplacian, laplacian, value_gradient_laplacian
from divflow.operators.parameters import parameter_jacobian

__all__ = [
    "FieldError",
    "explain_laplacian",
    "flat_gradient",
    "gradient",
    "hessian",
    "jacobian",
    "laplacian",
    "parameter_jacobian",
    "partial_derivative",
    "value_gradient_laplacian",
]
