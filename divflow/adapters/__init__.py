"""Models trained elsewhere as flows: log p with error bars, of what other libraries trained.

Each function takes a model as its library gives it, and returns a `divflow.flow.ContinuousFlow`. None of the libraries
is imported: a model is called, and a scheduler read, in the way that the function's docstring states.
"""

from divflow.adapters.denoiser import from_denoiser
from divflow.adapters.diffusers import from_diffusers
from divflow.adapters.flow_matching import from_flow_matching
from divflow.adapters.foreign import AdapterError
from divflow.adapters.torchcfm import from_torchcfm

__all__ = ["AdapterError", "from_denoiser", "from_diffusers", "from_flow_matching", "from_torchcfm"]
