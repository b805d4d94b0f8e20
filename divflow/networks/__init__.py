"""Velocity and score networks, all called as `net(t, x)`, t a scalar or one time a sample, and embeddings of time."""

from divflow.networks.concat_squash import ConcatSquash
from divflow.networks.conditioning import NetworkError
from divflow.networks.conv import ConvNet
from divflow.networks.diffusers_unet import DiffusersUNet
from divflow.networks.mlp import MLP
from divflow.networks.potential import MLPPotential, Potential, QuadraticPotential
from divflow.networks.time import GaussianFourierEmbedding, SinusoidalEmbedding
from divflow.networks.unet import UNet

__all__ = [
    "MLP",
    "ConcatSquash",
    "ConvNet",
    "DiffusersUNet",
    "GaussianFourierEmbedding",
    "MLPPotential",
    "NetworkError",
    "Potential",
    "QuadraticPotential",
    "SinusoidalEmbedding",
    "UNet",
]
