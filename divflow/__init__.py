"""divflow: exact and estimated divergences, and the models trained and evaluated through them.

`divflow.divergence` is the heart and needs torch alone; `divflow.flow` holds continuous normalizing
flows, those of `divflow.adapters` from models trained elsewhere; `divflow.load` brings a trained one back.
Submodules are imported on first use.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

__all__ = ["ContinuousFlow", "adapters", "divergence", "load", "operators"]

_ORIGIN = {"ContinuousFlow": "divflow.flow", "load": "divflow.saved.checkpoint"}

# Where names are that stood in modules before these had rooms: what others import, and what checkpoints name, goes on.
_MOVED = {
    "divflow.adjoint": ["divflow.solver.adjoint"],
    "divflow.arguments": ["divflow.errors"],
    "divflow.base_density": ["divflow.distributions.base_density"],
    "divflow.bases": ["divflow.distributions"],
    "divflow.build": ["divflow.saved.build", "divflow.runs.settings"],
    "divflow.captured": ["divflow.solver.captured"],
    "divflow.checkpoint": ["divflow.saved.checkpoint"],
    "divflow.dense_output": ["divflow.solver.dense_output"],
    "divflow.density": ["divflow.flow.data_density", "divflow.score.data_density"],
    "divflow.distribution": ["divflow.flow.distribution"],
    "divflow.divergence.field": ["divflow.operators.field", "divflow.operators.linearization"],
    "divflow.divergence.own": ["divflow.divergence.exact.own"],
    "divflow.divergence.plan": ["divflow.operators.plan"],
    "divflow.experiment": ["divflow.runs.experiment"],
    "divflow.figures": ["divflow.callbacks.plots"],
    "divflow.folder": ["divflow.runs.folder"],
    "divflow.importance": ["divflow.flow.importance"],
    "divflow.laplacian": ["divflow.operators.forward_laplacian"],
    "divflow.loggers": ["divflow.runs.loggers", "divflow.callbacks.figures"],
    "divflow.operands": ["divflow.operators.operands"],
    "divflow.processes": ["divflow.callbacks.signs_of_life"],
    "divflow.report": ["divflow.runs.report"],
    "divflow.rows": ["divflow.flow.rows"],
    "divflow.runs.build": ["divflow.saved.build", "divflow.runs.settings"],
    "divflow.runs.checkpoint": ["divflow.saved.checkpoint"],
    "divflow.step_control": ["divflow.solver.step_control", "divflow.solver.norms"],
    "divflow.support": ["divflow.distributions.support"],
    "divflow.sweeps": ["divflow.runs.sweeps"],
    "divflow.transform": ["divflow.flow.transform"],
    "divflow.transforms": ["divflow.flow.transforms"],
    "divflow.units": ["divflow.flow.units"],
}


def __getattr__(name: str) -> object:
    """Import on first use, so that `import divflow.divergence` costs no more than torch."""
    if name in _ORIGIN:
        return getattr(importlib.import_module(_ORIGIN[name]), name)
    if name in __all__ or f"divflow.{name}" in _MOVED:
        return importlib.import_module(f"divflow.{name}")
    raise AttributeError(f"module 'divflow' has no attribute {name!r}; it offers {', '.join(__all__)}")


class _Moved(MetaPathFinder, Loader):
    """Modules of before, each of which has the public names of those where they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """One of them, or None for any other module."""
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill it with the very objects."""
        for place in _MOVED[module.__name__]:
            found = importlib.import_module(place)
            vars(module).update({name: getattr(found, name) for name in found.__all__})


sys.meta_path.insert(0, _Moved())
