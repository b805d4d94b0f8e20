"""Energies of particles, samples of their Boltzmann densities, and known values of those densities."""

from divflow.energies.pairs import DoubleWell, EnergyError, LennardJones, PairEnergy
from divflow.energies.quartet import Quartet, quartet
from divflow.energies.tempering import Tempered, Tempering

__all__ = [
    "DoubleWell",
    "EnergyError",
    "LennardJones",
    "PairEnergy",
    "Quartet",
    "Tempered",
    "Tempering",
    "quartet",
]
