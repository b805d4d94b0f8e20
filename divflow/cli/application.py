"""A command as a Hydra application: one config tree wherever divflow is installed, errors that end with their message."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import divflow.sweeps  # registers how the folders of a sweep are named
from divflow.errors import DivflowError

__all__ = ["config_dir", "run_application"]


def config_dir() -> Path:
    """The config tree: `divflow/configs` of an installed wheel, or `configs` at the top of the repository."""
    package = Path(divflow.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def run_application(name: str, arguments: Sequence[str]) -> None:
    """Compose the config and run `divflow.cli.NAME.run` with it, or with `-m` a sweep of such jobs.

    The module of the command is imported once there is a config: help needs no torch.

    Modules in the current folder can be named in settings, as with `python -m`, but hide no installed one.

    Args:
        name: of the command and of its config; what its `run` returns is what a sweeper minimises or maximises.
        arguments: as of a command line, without the command.

    Raises:
        SystemExit: with 1 and its message, what a user can mend; with 130, Ctrl-C.
    """
    given = sys.argv

    def told(config: DictConfig) -> float | None:
        # Lightning starts a run's further processes by the command line of this one.
        with _command_line(given):
            return _ending_with_messages(name, config)

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with _command_line([given[0], *_with_absolute_config_path(arguments)]):
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(told)()


def _ending_with_messages(name: str, config: DictConfig) -> float | None:
    try:
        return importlib.import_module(f"divflow.cli.{name}").run(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except (DivflowError, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")
    except InstantiationException as error:
        if isinstance(error.__cause__, ImportError):  # its own message names the class
            sys.exit(f"error: {error}")
        if not isinstance(error.__cause__, (DivflowError, ValueError, TypeError)):
            raise
        sys.exit(f"error: {error.__cause__}")


def _with_absolute_config_path(arguments: Sequence[str]) -> list[str]:
    """Hydra takes a relative --config-path from the folder of the program, in which a user has nothing."""
    given = list(arguments)
    for i, argument in enumerate(arguments):
        name, equals, path = argument.partition("=")
        if name in ("--config-path", "-cp"):
            if equals:
                given[i] = f"{name}={_absolute(path)}"
            elif i + 1 < len(given):
                given[i + 1] = _absolute(given[i + 1])
    return given


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = arguments
    try:
        yield
    finally:
        sys.argv = before
