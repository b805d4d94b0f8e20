"""What the forward Laplacian costs, beside dense products with the Hessian."""

from torch import Tensor

from divflow.operators import dense
from divflow.operators.field import event_size
from divflow.operators.forward_laplacian.reader import JetReader
from divflow.operators.plan import Plan
from divflow.tape import NoRule, Tape

__all__ = ["FORWARD", "dense_plan", "forward_plan", "require_cheaper"]

FORWARD = "forward_laplacian"


def require_cheaper(reader: JetReader, size: int) -> None:
    """That products through functions without a rule, four for each dimension, leave it cheaper than dense products.

    Raises:
        NoRule: they don't.
    """
    forward = (1 + size) * reader.multiplications + 4 * size * reader.through
    if reader.opaque and forward > 2 * (1 + size) * (reader.multiplications + reader.through):
        raise NoRule(f"it takes longer ({_reasons(reader)})")


def _reasons(reader: JetReader) -> str:
    return f"{', '.join(dict.fromkeys(reader.opaque))}: through products of its own"


def forward_plan(x: Tensor, tape: Tape, reader: JetReader, chunk: int) -> Plan:
    """The plan of a forward pass of so many tangents at a time."""
    size = event_size(x)
    why = f"value, gradient and Laplacian from one pass of {size} tangents through {len(tape.signature)} operations"
    cost: float = 1 + size
    if reader.opaque:
        share = 4 * size * reader.through / max(1.0, reader.multiplications + reader.through)
        why, cost = f"{why}; {_reasons(reader)}, at the price of {share:.2g} evaluations", cost + share
    return Plan(FORWARD, why, size, chunk, cost, cost / 4, 3 * chunk * tape.widest * x.element_size())


def dense_plan(x: Tensor, why: str) -> Plan:
    """A product with the Hessian takes about two forward passes, one with it beside the gradient four."""
    size = event_size(x)
    chunk = min(dense.products_per_pass(x), max(1, size))
    cost = 2 + 2 * size
    return Plan(
        "reverse", f"dense products: {why}", size, chunk, cost, cost / 4, chunk * 2 * x.numel() * x.element_size()
    )
