"""Distributions with a closed density that serve as the bases of flows, beside those of `torch.distributions`."""

from divflow.distributions.base import BaseError, OnSubspace, standard_normal
from divflow.distributions.base_density import BaseDensity
from divflow.distributions.mean_free import MeanFreeNormal

__all__ = ["BaseDensity", "BaseError", "MeanFreeNormal", "OnSubspace", "standard_normal"]
