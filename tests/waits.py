"""What a training step asks of its device: the points where the host waits for it, and the kernels it launches."""

import collections
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WATCHED = ("divflow", "torchdiffeq", "lightning", "torchmetrics", "torch/optim", "torch/nn")
# The host reads a number, or the size of a result depends on numbers.
_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique", "_unique2")
_TESTS = str(Path(__file__).parent)  # which lie in a folder named divflow, too, where the clone is named so
_NO_KERNELS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense")


class Watch(TorchDispatchMode):
    """Counts, while it is entered, what reaches the device `device_type`.

    On a machine without another device it counts what happens to the CPU's own tensors: the same reads, but none of
    the copies from one device to another.

    Attributes:
        waits: by place, `file:line` of the innermost line of a library or of divflow.
        kernels: by the part of divflow, or the library, that the innermost line is in.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.waits: collections.Counter[str] = collections.Counter()
        self.kernels: collections.Counter[str] = collections.Counter()
        self._part_of_node: dict[int, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in (*inputs, *outputs) if tensor.device.type == self.device_type]
        if here:
            name = func.overloadpacket.__name__
            if self._waits(name, args, kwargs or {}, inputs, outputs):
                self.waits[_place()] += 1
            elif name not in _NO_KERNELS and not _is_view(func) and any(tensor.numel() for tensor in here):
                self.kernels[self._part()] += 1
        return result

    def _waits(self, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        if name in _READS:
            # The optimizers of torch keep their step counters on the CPU whatever the device.
            counter = self.device_type == "cpu" and "/torch/optim/" in _frames()[0][0]
            return not counter and any(tensor.device.type == self.device_type for tensor in inputs)
        if name == "lift_fresh":  # torch.tensor and the like have copied numbers to the device
            return self.device_type != "cpu"
        if name in ("index", "index_put", "index_put_"):  # by a mask, or by numbers of the host
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            return masked or any(index.device.type != self.device_type for index in indices)
        if name in ("_to_copy", "copy_"):
            blocking = not kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
            return blocking and len({tensor.device.type for tensor in (*inputs, *outputs)}) > 1
        return False

    def _part(self) -> str:
        """Where this kernel, or the forward operation that it is the derivative of, was asked for."""
        node = torch._C._current_autograd_node()
        if node is not None and (part := self._part_of_node.get(node._sequence_nr())):
            return f"{part}, backward"
        part = _part()
        self._part_of_node[torch._C._autograd._get_sequence_nr() - 1] = part
        return part


def _is_view(func) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


def _frames() -> list[tuple[str, str, int]]:
    """(path, function, line) of the calls in watched libraries, the innermost first."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        path = frame.f_code.co_filename
        if any(f"/{name}/" in path for name in _WATCHED) and "torch/utils" not in path and not path.startswith(_TESTS):
            found.append((path, frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    return found


def _short(path: str) -> str:
    parts = Path(path).parts
    names = [
        i for i, part in enumerate(parts) if part in ("divflow", "torchdiffeq", "lightning", "torchmetrics", "torch")
    ]
    return "/".join(parts[names[-1] :]) if names else path


def _place() -> str:
    frames = _frames()
    inner = next((frame for frame in frames if "/torch/" not in frame[0]), frames[0] if frames else ("?", "?", 0))
    return f"{_short(inner[0])}:{inner[2]} {inner[1]}"


def _part() -> str:
    names, network = [_short(path) for path, _, _ in _frames()], False
    for name in names:
        network = network or name.startswith(("divflow/networks", "divflow/likelihood/conditioned"))
        if name.startswith("torch/optim") and not network:
            return "optimizer"
        if name.startswith("divflow/divergence/") and not name.endswith("/field.py"):
            return "divergence"
        if name.startswith(("torchdiffeq", "divflow/solver")):
            return "network, evaluated by the solver" if network else "solver's own arithmetic"
        if name.startswith(("divflow/callbacks", "lightning/pytorch/callbacks")):
            return "callbacks"
        # The evaluation of a network passes through these, too, on its way to the solver.
        outer = ("divflow/score", "divflow/tasks", "divflow/flow", "divflow/likelihood/quadrature")
        if name.startswith(outer) and not network:
            return name
    return "network" if network else "the rest"
