"""Models trained elsewhere as flows: their log-densities, with error bars.

Each function takes a model as its library provides it, and returns a `divflow.flow.ContinuousFlow`. None of the libraries
is imported. The docstring of each function states how the model is called and how a scheduler is read.
"""

from divflow.adapters.denoiser import from_denoiser
from divflow.adapters.diffusers import from_diffusers
from divflow.adapters.flow_matching import from_flow_matching
from divflow.adapters.foreign import AdapterError
from divflow.adapters.torchcfm import from_torchcfm

__all__ = ["AdapterError", "from_denoiser", "from_diffusers", "from_flow_matching", "from_torchcfm"]
