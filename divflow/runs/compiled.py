"""torch.compile of the network of a run: what it costs, and where it can't work, reported before training."""

import os
import sysconfig
from pathlib import Path
from typing import cast

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from divflow.flow import FlowDensity
from divflow.saved.build import ConfigError
from divflow.score import UnnormalizedDensity

__all__ = ["compile_network"]

_COST = (
    "compile=true: torch compiles the network once for each way in which it is evaluated (training, validation, shapes of batch and time), "
    "10 to 40 s each on a CPU, before the first step and in the first validation. It pays in long runs of large networks"
)


def compile_network(density: FlowDensity | UnnormalizedDensity) -> None:
    """Compile the network of a density at its first evaluation, and print what that costs.

    Raises:
        ConfigError: there is no C++ compiler, or Python's header, which the compiler needs, is missing.
    """
    _check_compiler()
    rank_zero_only(print)(_COST)
    network = density.score_field if isinstance(density, UnnormalizedDensity) else density.flow.velocity
    cast(nn.Module, network).compile()


def _check_compiler() -> None:
    # Here, since it takes a second to import.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    off = "or leave compile=false"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        named = os.environ.get("CXX", "g++")
        raise ConfigError(
            f"compile=true needs a C++ compiler, but {named} is not there or does not run. Install g++, or name one by the environment "
            f"variable CXX, {off}"
        ) from error
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise ConfigError(f"compile=true needs Python's headers, but there is no {header}. Install python3-dev, {off}")
