"""divflow: exact and estimated divergences, and the models trained or evaluated through them.

- `divflow.divergence` is the core and needs torch alone.
- `divflow.operators` has Jacobians, Laplacians and other derivatives of plain functions.
- `divflow.flow` has continuous normalizing flows; `divflow.adapters` makes them from models trained elsewhere.
- `divflow.load` loads a trained model.

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

# Former modules and where their names are now, so that old imports and the names in old checkpoints keep working.
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
    raise AttributeError(f"module 'divflow' has no attribute {name!r}; available are {', '.join(__all__)}")


class _Moved(MetaPathFinder, Loader):
    """Former modules, each with the public names of the modules that replaced it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a former module, or None for any other."""
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with the same objects."""
        for place in _MOVED[module.__name__]:
            found = importlib.import_module(place)
            vars(module).update({name: getattr(found, name) for name in found.__all__})


sys.meta_path.insert(0, _Moved())
