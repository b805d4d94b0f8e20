"""Manifolds: directions, angles, rotations and products of them, with their geodesics and densities."""

from divflow.manifolds.coordinates import (
    Coordinates,
    LatitudeLongitude,
    Quaternions,
    RotationMatrices,
    WrappedAngles,
)
from divflow.manifolds.densities import Uniform, WrappedNormal
from divflow.manifolds.euclidean import Euclidean
from divflow.manifolds.manifold import Manifold, ManifoldError
from divflow.manifolds.product import Product
from divflow.manifolds.rotations import SpecialOrthogonal, hat, quaternion, rotation_matrix, vee
from divflow.manifolds.sphere import Sphere
from divflow.manifolds.tangent_field import TangentField
from divflow.manifolds.torus import Torus

__all__ = [
    "Coordinates",
    "Euclidean",
    "LatitudeLongitude",
    "Manifold",
    "ManifoldError",
    "Product",
    "Quaternions",
    "RotationMatrices",
    "SpecialOrthogonal",
    "Sphere",
    "TangentField",
    "Torus",
    "Uniform",
    "WrappedAngles",
    "WrappedNormal",
    "hat",
    "quaternion",
    "rotation_matrix",
    "vee",
]
