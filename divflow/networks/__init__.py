"""Velocity and score networks, all called as `net(t, x)`, t a scalar or one time a sample."""

from divflow.networks.concat_squash import ConcatSquash
from divflow.networks.conv import ConvNet
from divflow.networks.mlp import MLP

__all__ = ["MLP", "ConcatSquash", "ConvNet"]
