"""divflow: exact and estimated divergences, and the models trained or judged through them.

`divflow.divergence` is the heart and needs torch alone; `divflow.flow` holds continuous normalizing
flows, those of `divflow.adapters` from models trained elsewhere; `divflow.load` brings a trained one back.
Submodules are imported on first use.
"""

import importlib

__version__ = "0.1.0"

__all__ = ["ContinuousFlow", "adapters", "divergence", "load", "operators"]

_ORIGIN = {"ContinuousFlow": "divflow.flow", "load": "divflow.checkpoint"}


def __getattr__(name: str) -> object:
    """Import on first use, so that `import divflow.divergence` costs no more than torch."""
    if name in _ORIGIN:
        return getattr(importlib.import_module(_ORIGIN[name]), name)
    if name in __all__:
        return importlib.import_module(f"divflow.{name}")
    raise AttributeError(f"module 'divflow' has no attribute {name!r}; it offers {', '.join(__all__)}")
