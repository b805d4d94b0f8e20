"""Particles on springs to their centre, whose Boltzmann density is a normal one."""

import math
from dataclasses import dataclass

from divflow.energies import PairEnergy


@dataclass(frozen=True)
class Springs(PairEnergy):
    """U(x) = stiffness / 2 sum_i |x_i - mean x|^2: entries of variance (1 - 1 / n) / stiffness."""

    particles: int = 4
    dimensions: int = 2
    stiffness: float = 4.0

    def pair(self, squared):
        return self.stiffness / (2 * self.particles) * squared

    @property
    def freedom(self):
        return (self.particles - 1) * self.dimensions

    @property
    def log_normalizer(self):
        return self.freedom / 2 * math.log(2 * math.pi / self.stiffness)
