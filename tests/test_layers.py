"""Rooms of `divflow/` import from those below them alone, and no files round in a circle, for types or within functions either."""

import ast
import functools
from collections.abc import Iterable, Iterator

import networkx as nx
import pytest
from run import ROOT

SOURCE = ROOT / "divflow"

# From the lowest; rooms of one line stand beside each other, and may use one another where that is no circle.
LAYERS = [
    ["errors"],
    ["tape"],
    ["verification"],
    ["operators"],
    ["divergence"],
    ["manifolds"],
    ["distributions"],
    ["solver"],
    ["likelihood"],
    ["flow"],
    ["matching", "score", "energies", "networks", "adapters", "data"],
    ["saved"],
    ["tasks"],
    ["callbacks"],
    ["runs"],
    ["cli"],
]
LEVELS = {room: level for level, layer in enumerate(LAYERS) for room in layer}
# The package itself knows its rooms by name only, until these are asked for; `python -m divflow` is the command.
ENTRANCES = {"divflow", "divflow.__main__"}


def files() -> dict[str, ast.Module]:
    """The syntax of every file, by the name of its module."""
    return dict(_parsed())


@functools.cache
def _parsed() -> dict[str, ast.Module]:
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text())
    return found


def imported(tree: ast.Module, modules: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The modules of divflow that a file imports, wherever in it that stands, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "divflow" or name.startswith("divflow."):
                while name not in modules:  # a class or function of it
                    name = name.rpartition(".")[0]
                yield name, node.lineno


def room(module: str) -> str:
    return module.split(".")[1]


def edges(trees: dict[str, ast.Module]) -> Iterator[tuple[str, str, int]]:
    for module, tree in trees.items():
        for other, line in imported(tree, trees):
            if module not in ENTRANCES and other not in ENTRANCES:
                yield module, other, line


def upward(trees: dict[str, ast.Module]) -> dict[tuple[str, str], list[str]]:
    """Imports from a higher layer, as pairs of rooms with where they stand."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, other, line in edges(trees):
        if LEVELS[room(module)] < LEVELS[room(other)]:
            found.setdefault((room(module), room(other)), []).append(f"{module}:{line} imports {other}")
    return found


def circles(pairs: Iterable[tuple[str, str]]) -> list[set[str]]:
    graph = nx.DiGraph(pairs)
    loops = [{name} for name in nx.nodes_with_selfloops(graph)]
    return [part for part in nx.strongly_connected_components(graph) if len(part) > 1] + loops


def rooms(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    return {(room(a), room(b)) for a, b, _ in edges(trees) if room(a) != room(b)}


def test_every_file_has_a_room():
    assert {room(module) for module in files() if module not in ENTRANCES} <= set(LEVELS)
    assert {file.stem for file in SOURCE.glob("*.py")} == {"__init__", "__main__", "errors"}


def test_rooms_import_from_those_below_alone():
    assert upward(files()) == {}


def test_no_rooms_go_round():
    assert circles(rooms(files())) == []


def test_no_files_go_round():
    assert circles((a, b) for a, b, _ in edges(files())) == []


@pytest.mark.parametrize(
    "source",
    [
        "from divflow.flow import ContinuousFlow",
        "import divflow.flow.continuous as flow",
        "from divflow import flow",
        "if TYPE_CHECKING:\n    from divflow.flow import ContinuousFlow",
        "def f():\n    from divflow.flow.continuous import ContinuousFlow",
    ],
)
def test_what_goes_up_is_seen_wherever_it_stands(source):
    trees = files()
    trees["divflow.solver.step_control"] = ast.parse(source)
    assert ("solver", "flow") in upward(trees)
    assert {"solver", "flow"} <= set().union(*circles(rooms(trees)))


def test_what_goes_round_within_a_room_is_seen():
    trees = files()
    trees["divflow.score.field"] = ast.parse("if TYPE_CHECKING:\n    from divflow.score import SDE")
    assert any({"divflow.score", "divflow.score.field"} <= part for part in circles((a, b) for a, b, _ in edges(trees)))
