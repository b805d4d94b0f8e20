"""Toy densities in the plane and on manifolds with a known log-density, and the data module that samples them."""

from divflow.data.toy.curves import CurveDensity, circles, swiss_roll, two_moons, two_spirals
from divflow.data.toy.mixtures import (
    VonMisesFisherMixture,
    WrappedNormalMixture,
    rotations_mixture,
    sphere_mixture,
    torus_mixture,
)
from divflow.data.toy.module import Toy
from divflow.data.toy.patches import Checkerboard, Pinwheel, checkerboard, eight_gaussians, pinwheel

__all__ = [
    "Checkerboard",
    "CurveDensity",
    "Pinwheel",
    "Toy",
    "VonMisesFisherMixture",
    "WrappedNormalMixture",
    "checkerboard",
    "circles",
    "eight_gaussians",
    "pinwheel",
    "rotations_mixture",
    "sphere_mixture",
    "swiss_roll",
    "torus_mixture",
    "two_moons",
    "two_spirals",
]
