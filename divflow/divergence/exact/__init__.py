"""The exact divergence, by the cheapest method that serves a field.

exact       asks the methods in their order: `own`, `layered`, `colored`, then `dense` products for any field
method      what a method is
followed    a field evaluated once, with the tape of what it did
forward     columns by forward mode, on request
"""

from divflow.divergence.exact.exact import Exact

__all__ = ["Exact"]
