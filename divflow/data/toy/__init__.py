"""Toy densities in the plane with a known log-density, and the data module that samples them."""

from divflow.data.toy.curves import CurveDensity, circles, swiss_roll, two_moons, two_spirals
from divflow.data.toy.module import Toy
from divflow.data.toy.patches import Checkerboard, Pinwheel, checkerboard, eight_gaussians, pinwheel

__all__ = [
    "Checkerboard",
    "CurveDensity",
    "Pinwheel",
    "Toy",
    "checkerboard",
    "circles",
    "eight_gaussians",
    "pinwheel",
    "swiss_roll",
    "two_moons",
    "two_spirals",
]
