"""A wheel of the working tree, and a virtual environment that has it beside the packages that the tests see."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from run import ROOT

PIP = [sys.executable, "-m", "pip"]


def build(folder: Path) -> Path:
    """The wheel, built in the folder from what it is made of alone, without a network."""
    for name in ("divflow", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    offline = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*PIP, "wheel", *offline, "--wheel-dir", folder, folder / "source"], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Make a virtual environment in the folder and install the wheel there; returns its `bin`."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith("-packages")]
    # After the environment's own; what an editable divflow of the tests has in its .pth is not followed from here.
    (packages / "tests.pth").write_text("\n".join(seen))
    python = folder / "bin" / "python"
    # The wheel's files alone: what is imported is compiled at its first import.
    offline = ["--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*PIP, "--python", python, "install", *offline, wheel], check=True, capture_output=True)
    return folder / "bin"


def environment(bin: Path, cache: Path) -> dict[str, str]:
    """The variables of one who has activated it, and has nothing of the working tree on Python's path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    path = os.pathsep.join([str(bin), os.environ["PATH"]])
    return kept | {"PATH": path, "VIRTUAL_ENV": str(bin.parent), "XDG_CACHE_HOME": str(cache)}
