"""Velocity and score networks, called as `net(t, x)` with t a scalar or one time a sample.

Embeddings of time and features of points are what they see of both.
"""

from divflow.networks.concat_squash import ConcatSquash
from divflow.networks.conditioning import NetworkError
from divflow.networks.conv import ConvNet
from divflow.networks.diffusers_unet import DiffusersUNet
from divflow.networks.egnn import EGNN
from divflow.networks.features import FourierFeatures, ManifoldFeatures, PeriodicFeatures
from divflow.networks.hollow_egnn import HollowEGNN
from divflow.networks.hollow_mlp import HollowMLP
from divflow.networks.mlp import MLP
from divflow.networks.pair_field import PairField
from divflow.networks.potential import MLPPotential, Potential, QuadraticPotential
from divflow.networks.time import GaussianFourierEmbedding, LogarithmicEmbedding, SinusoidalEmbedding
from divflow.networks.token_mixer import TokenMixer
from divflow.networks.unet import UNet

__all__ = [
    "EGNN",
    "MLP",
    "ConcatSquash",
    "ConvNet",
    "DiffusersUNet",
    "FourierFeatures",
    "GaussianFourierEmbedding",
    "HollowEGNN",
    "HollowMLP",
    "LogarithmicEmbedding",
    "MLPPotential",
    "ManifoldFeatures",
    "NetworkError",
    "PairField",
    "PeriodicFeatures",
    "Potential",
    "QuadraticPotential",
    "SinusoidalEmbedding",
    "TokenMixer",
    "UNet",
]
