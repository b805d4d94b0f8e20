"""The lower bounds of the dependencies are versions that the tests were run with, as are the newest ones."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
EXTRA = [line for name in ("diffusers", "mnist", "uci") for line in EXTRAS[name]]
NEEDED = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRA)]


def _pins(file):
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    assert all([bound.operator for bound in pin.specifier] == ["=="] for pin in pins)
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


@pytest.mark.parametrize("needed", NEEDED, ids=lambda needed: needed.name)
def test_the_lower_bound_is_the_oldest_version_tried(needed):
    (bound,) = needed.specifier  # an upper one would refuse versions that nobody has tried
    assert bound.operator == ">="
    assert Version(bound.version) == Version(_pins("constraints-oldest.txt")[canonicalize_name(needed.name)])


COMPARED = [Requirement(line) for name in ("bench", "peers", "partners") for line in EXTRAS[name]]


@pytest.mark.parametrize("needed", [*NEEDED, *COMPARED], ids=lambda needed: needed.name)
def test_the_newest_version_tried_is_allowed(needed):
    assert needed.specifier.contains(_pins("constraints.txt")[canonicalize_name(needed.name)], prereleases=True)
