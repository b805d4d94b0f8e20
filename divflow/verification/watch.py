"""One verified evaluation of a user's function: its operations are recorded, and then compared with what autograd sees."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from divflow.errors import FieldError, FieldWarning
from divflow.tape.graph import graph_of
from divflow.verification.differences import compare
from divflow.verification.mixing import mixed_by
from divflow.verification.products import reentrant_refused
from divflow.verification.schedule import Record, answer, due, verifying
from divflow.verification.severed import Following

__all__ = ["Watch", "watch"]

Function = Callable[[Tensor], Tensor]
# After so many comparisons that found a suspect field right, it is not compared again.
_ENOUGH = 2
_REMEDY = (
    "Keep the graph (create_graph=True; no detach, no_grad or numpy between x and the value), or declare that this is intended, by "
    "detached=True or within divflow.verification.severed_fields('allow')."
)


def watch(function: Function, x: Tensor) -> "Watch | None":
    """Return a watcher for the next evaluation of a function, or None if this call is not verified.

    Args:
        function: of the state alone.
        x: states `(k, *event)`.
    """
    record = due(function, x)
    return None if record is None else Watch(function, x, record)


def _is_fused(name: str) -> bool:
    return name.startswith("ScaledDotProduct") and "Math" not in name


class Watch:
    """A function that is watched while it is evaluated.

    Args:
        function: of the state alone.
        x: states `(k, *event)`.
        record: of its calls.
    """

    def __init__(self, function: Function, x: Tensor, record: Record) -> None:
        self._function, self._x, self._record = function, x.detach(), record
        self._following: Following | None = None
        self._output: object = None

    def __call__(self, z: Tensor) -> Tensor:
        """Evaluate the function at the state z, which requires grad."""
        self._following = Following(z)
        with self._following.listening:
            output = self._function(z)
        self._output = output
        return output

    def conclude(self, output: Tensor, point: Tensor, twice: bool) -> None:
        """Check what was observed.

        Args:
            output: the checked value, with its graph.
            point: the state from which its graph starts.
            twice: whether products with its Jacobian may be differentiated.

        Raises:
            FieldError: samples are mixed; a kernel lacks the second derivatives that are needed; or something is severed, if
                that is refused.
        """
        record = self._record
        names = (node.name() for node in graph_of(output, start=point)) if twice else ()
        fused = next(filter(_is_fused, names), None)
        if fused is not None:
            record.wrong = True
            raise FieldError(
                f"the field uses a fused attention kernel, which has no second derivatives ({fused}), but the divergence is to be "
                "differentiated. Remove its sdpa_kernel context, or restrict it to SDPBackend.MATH; under torch.no_grad any "
                "kernel works."
            )
        with verifying(), reentrant_refused():
            mixed = mixed_by(output, point, record.schedule.calls)
        if mixed is not None:
            record.wrong = True
            raise FieldError(
                f"the field mixes the samples of a batch: for states of shape {tuple(point.shape)}, values at some samples depend on "
                f"others (with a gradient of {float(mixed):.2g} of their own), so its divergence would be wrong. Look for "
                "normalization (BatchNorm in training mode), attention, statistics or edges over dimension 0, and evaluate samples "
                f"that belong together as one event.{' If x is one sample, use x.unsqueeze(0).' if point.ndim == 1 else ''}"
            )
        record.wrong = False
        self._compare(output, point)

    def _compare(self, output: Tensor, point: Tensor) -> None:
        record = self._record
        if self._following is None or not isinstance(self._output, Tensor) or answer() == "allow":
            return
        suspicion = self._following.suspicion(self._output, graph_of(output, start=point))
        if suspicion is None or record.right.get(suspicion, 0) >= _ENOUGH:
            return
        with verifying(), torch.inference_mode(False):
            found = compare(self._function, self._x)
        if found.verdict == "right" and found.telling:
            record.right[suspicion] = record.right.get(suspicion, 0) + 1
        elif found.verdict == "unknown":
            record.note = f"not compared with differences, though {suspicion}: {found.why}"
            if not output.requires_grad and "severed" in suspicion:
                self._report(f"autograd sees nothing of how the field depends on x: {suspicion}. {_REMEDY}", False)
        elif found.verdict == "wrong":
            record.wrong = True
            self._report(
                f"autograd does not see all of how the field depends on x: {suspicion}. A derivative is "
                f"{found.difference:.6g} by central differences and {found.autograd:.6g} by autograd, so its divergence "
                f"would be wrong. {_REMEDY}",
                found.certain,
            )

    def _report(self, message: str, certain: bool) -> None:
        if certain and answer() == "refuse":
            raise FieldError(message)
        if not self._record.warned:
            self._record.warned = True
            warnings.warn(message, FieldWarning, stacklevel=2)
