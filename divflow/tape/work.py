"""The cost of an evaluation, counted."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Work"]


class Work(TorchDispatchMode):
    """Count multiplications of matrix products and convolutions, the entries of all results, and their bytes.

    Attributes:
        operations: multiplications and entries.
        memory: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.memory = 0, 0

    @staticmethod
    def of(function: Callable[[], object]) -> "Work":
        """The work of a call."""
        with Work() as work:
            function()
        return work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        from torch.utils.flop_counter import flop_registry  # loaded where a cost is asked for

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result) // 2
        if isinstance(result, Tensor) and not func.is_view:
            self.operations += result.numel()
            self.memory += result.numel() * result.element_size()
        return result
