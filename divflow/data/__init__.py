"""Lightning data modules: toy densities and particles of known log-density, digits, tables, simulations, and your own images and tables."""

from divflow.data.angles import Angles
from divflow.data.dequantization import Dequantization, TruncatedNormalDequantization, UniformDequantization
from divflow.data.digits import Digits, Mnist
from divflow.data.discrete import DiscreteImages
from divflow.data.images import Images
from divflow.data.literature import Literature
from divflow.data.module import DataError, TensorDataModule
from divflow.data.particles import Particles
from divflow.data.places import Places
from divflow.data.rotations import Rotations
from divflow.data.simulations import Simulations
from divflow.data.simulator import Simulator
from divflow.data.table import Table
from divflow.data.toy import Toy
from divflow.data.uci import Uci
from divflow.flow.transforms import Affine, Bounded, Compose, Logit, MeanFreeScale, Rounded, Transform

__all__ = [
    "Affine",
    "Angles",
    "Bounded",
    "Compose",
    "DataError",
    "Dequantization",
    "Digits",
    "DiscreteImages",
    "Images",
    "Literature",
    "Logit",
    "MeanFreeScale",
    "Mnist",
    "Particles",
    "Places",
    "Rotations",
    "Rounded",
    "Simulations",
    "Simulator",
    "Table",
    "TensorDataModule",
    "Toy",
    "Transform",
    "TruncatedNormalDequantization",
    "Uci",
    "UniformDequantization",
]
