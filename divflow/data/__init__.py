"""Lightning data modules: toy densities and particles of known log-density, handwritten digits, images and tables of one's own."""

from divflow.data.dequantization import Dequantization, TruncatedNormalDequantization, UniformDequantization
from divflow.data.digits import Digits, Mnist
from divflow.data.discrete import DiscreteImages
from divflow.data.images import Images
from divflow.data.module import DataError, TensorDataModule
from divflow.data.particles import Particles
from divflow.data.table import Table
from divflow.data.toy import Toy
from divflow.transforms import Affine, Compose, Logit, MeanFreeScale, Transform

__all__ = [
    "Affine",
    "Compose",
    "DataError",
    "Dequantization",
    "Digits",
    "DiscreteImages",
    "Images",
    "Logit",
    "MeanFreeScale",
    "Mnist",
    "Particles",
    "Table",
    "TensorDataModule",
    "Toy",
    "Transform",
    "TruncatedNormalDequantization",
    "UniformDequantization",
]
