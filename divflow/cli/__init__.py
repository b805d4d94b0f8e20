"""The commands `divflow train`, `evaluate`, `sample` and `compare`, each in its own file, which is imported when it runs."""

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence

import divflow
from divflow.runs.signals import Stopped, alone, heard

__all__ = ["main"]

_COMMANDS = {
    "train": "train a density and test it; the run is left in a folder of its own",
    "evaluate": "write the log-density of every row of some data",
    "sample": "write samples, in the units of the data",
    "compare": "show the runs of a folder side by side",
}
_EXAMPLES = """\
`divflow COMMAND --help` explains the settings of a command.

examples:
  divflow train data=two_moons estimator=exact
  divflow evaluate ckpt_path=outputs/latest/checkpoints/best.ckpt split=test
  divflow sample ckpt_path=outputs/latest/checkpoints/best.ckpt num_samples=1000 out=samples.csv"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: the command and its settings; those of this process if None.

    Raises:
        SystemExit: with 1 and a message for a mistake that the user can correct; with 2 for an unknown command; with 130 or 143
            after an interruption.
    """
    try:
        with heard(), alone():
            _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except Stopped:
        print("\nstopped", file=sys.stderr)
        sys.exit(143)


def _run(given: list[str]) -> None:
    if given and given[0] in _COMMANDS:
        command, *settings = given
        if command == "compare":
            importlib.import_module("divflow.cli.compare").run(settings)
        else:
            importlib.import_module("divflow.cli.application").run_application(command, settings)
        return
    parser = argparse.ArgumentParser(
        prog="divflow",
        description="Train and evaluate densities: normalizing flows, flow matching and score models.",
        epilog=_EXAMPLES,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=100),
    )
    parser.add_argument("--version", action="version", version=f"divflow {divflow.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, does in _COMMANDS.items():
        commands.add_parser(name, help=does)
    parser.parse_args(given)
