"""A function of tensors, followed as it is evaluated: all knowledge of torch's operations is in this package.

    operation   one call of a torch function: its name, arguments and structure
    listening   the one mode that sees torch functions
    rule        what an operation is; `elementwise`, `movements`, `linear`, `reductions`, `written` are the rules, `table`
                assigns them to operations, and `registry` adds a user's own
    steps       what a tape holds, and `opaque` what is known by its graph alone
    tape        records, for a reader that carries something through the steps
    verify      compares a rule with autograd

Its readers are the layered divergence, the colouring and the forward Laplacian.
"""

from divflow.tape.elementwise import Elementwise
from divflow.tape.linear import Linear
from divflow.tape.registry import register, unregister
from divflow.tape.rule import NoRule, RuleError
from divflow.tape.tape import Tape
from divflow.tape.written import Written

__all__ = ["Elementwise", "Linear", "NoRule", "RuleError", "Tape", "Written", "register", "unregister"]
