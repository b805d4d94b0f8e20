"""A command as a Hydra application: one config tree wherever divflow is installed, and errors that end with their message."""

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import divflow.cli.help  # registers how choices are listed
import divflow.runs.sweeps  # registers how the folders of a sweep are named
from divflow.cli.command_line import for_hydra
from divflow.cli.mistakes import check_no_choice_is_hidden, check_options, in_a_line, last_own_line
from divflow.errors import DivflowError
from divflow.runs.signals import alone

__all__ = ["config_dir", "run_application"]

# Settings that name an existing file or folder, or the folder of a run.
_PATHS = ("output_dir", "ckpt_path", "init_from", "data.path", "data.cache")


def config_dir() -> Path:
    """Folder of the config tree: `divflow/configs` of an installed wheel, or `configs` at the top of the repository."""
    package = Path(divflow.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def run_application(name: str, arguments: Sequence[str]) -> None:
    """Compose the config and run `divflow.cli.NAME.run` with it, or with `-m` a sweep of such jobs.

    The module of the command is imported once there is a config, so help needs no torch. Settings can name modules in the
    current folder, as with `python -m`; these hide no installed ones.

    Args:
        name: name of the command and of its config. A sweeper minimises or maximises what its `run` returns.
        arguments: command line, without the command.

    Raises:
        SystemExit: with 1 and a message for a mistake that the user can correct.
    """
    given = sys.argv

    full = "HYDRA_FULL_ERROR" in os.environ
    begun = False

    def run(config: DictConfig) -> float | None:
        nonlocal begun
        begun = True
        if not full:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        # Lightning starts a run's further processes by the command line of this one.
        with _command_line(given), _plain_warnings(), alone():
            return _ending_with_messages(name, _with_whole_paths(config, Path(get_original_cwd())))

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    # Until there is a config, let Hydra raise its errors. It would print them, some with a traceback.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        check_options(arguments, name)
        with _command_line([given[0], *for_hydra(arguments)]):
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(run)()
    except Exception as error:
        if full or begun:
            raise
        groups = [path.name for path in config_dir().iterdir()]
        sys.exit(f"error: {in_a_line(error, name, groups)}")
    finally:
        if not full:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _ending_with_messages(name: str, config: DictConfig) -> float | None:
    try:
        check_no_choice_is_hidden(HydraConfig.get().runtime.config_sources, config_dir())
        return importlib.import_module(f"divflow.cli.{name}").run(config)
    except (DivflowError, OmegaConfBaseException) as error:
        _end(str(error), error)
    except InstantiationException as error:
        if error.__cause__ is None or isinstance(error.__cause__, ImportError):  # its own message names the class
            _end(str(error).partition(", set env var")[0], error)
        if not isinstance(error.__cause__, (DivflowError, ValueError, TypeError, ArithmeticError)):
            _end_in_own_code(error.__cause__)
            raise
        _end(str(error.__cause__), error)
    except Exception as error:
        _end_in_own_code(error)
        raise


def _end(message: str, error: Exception) -> NoReturn:
    """End with a message; in a sweep only this run ends, and Hydra counts its error and reports it after the others."""
    if os.environ.get("HYDRA_FULL_ERROR"):
        raise error
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        print(f"error: {message}", file=sys.stderr)
        raise CompactHydraException(f"error: {message}") from error
    sys.exit(f"error: {message}")


def _end_in_own_code(error: BaseException) -> None:
    """End with a message if the error passed through a file of the user's, with the last line there; divflow's own errors go on."""
    place = last_own_line(error)
    if place is not None and isinstance(error, Exception):
        kind, text = type(error).__name__, " ".join(str(error).split())
        _end(f"{kind}: {text} ({place}). For the whole traceback, set HYDRA_FULL_ERROR=1", error)


def _with_whole_paths(config: DictConfig, folder: Path) -> DictConfig:
    """Resolve relative paths of the config against the folder where the command was typed, also if a job has changed it."""
    for name in _PATHS if Path.cwd() != folder else ():
        if isinstance(path := OmegaConf.select(config, name), str):
            OmegaConf.update(config, name, str(folder / Path(path).expanduser()))
    return config


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings within this context as errors are printed, without the source line that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = arguments
    try:
        yield
    finally:
        sys.argv = before
