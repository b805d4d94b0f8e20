"""Public names say what they are for in one sentence, and document the arguments that they have: all of them, and no others."""

import ast
import re
from collections.abc import Iterator

import pytest
from run import ROOT
from test_layers import files

Callable = ast.FunctionDef | ast.ClassDef
SECTIONS = "Args|Attributes|Returns|Yields|Raises|Warns|Example|Shape"
FILES = files()
CLASSES = {node.name: node for tree in FILES.values() for node in tree.body if isinstance(node, ast.ClassDef)}


def public(tree: ast.Module) -> Iterator[tuple[str, Callable]]:
    """The functions and classes that a file defines and names in `__all__`, and the public methods of these classes."""
    for node in tree.body:
        if isinstance(node, Callable) and node.name in exported(tree):
            yield node.name, node
            for part in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and not is_setter(part):
                    yield f"{node.name}.{part.name}", part


def exported(tree: ast.Module) -> list[str]:
    """The names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(it, ast.Name) and it.id == "__all__" for it in node.targets):
            return ast.literal_eval(node.value)
    return []


def is_setter(function: ast.FunctionDef) -> bool:
    """Whether it is documented by the property that it sets."""
    return any(isinstance(it, ast.Attribute) and it.attr == "setter" for it in function.decorator_list)


def section(docstring: str, title: str) -> list[str]:
    """The names that a section of a docstring explains, in their order."""
    found = re.search(rf"^{title}:\n(.*?)(?=^(?:{SECTIONS}):$|^\S|\Z)", docstring, flags=re.DOTALL | re.MULTILINE)
    return [] if found is None else re.findall(r"^    \*{0,2}(\w+)(?: \(.*\))?:", found[1], flags=re.MULTILINE)


def parameters(node: Callable, bound: bool = True) -> list[str]:
    """The names of a call's arguments; of a class those of its constructor, or of the fields that make it."""
    if isinstance(node, ast.ClassDef):
        constructor = next((it for it in node.body if isinstance(it, ast.FunctionDef) and it.name == "__init__"), None)
        if constructor is None:
            inherited = [name for base in bases(node) for name in parameters(base)]
            return list(dict.fromkeys(inherited + (fields(node) if "dataclass" in decorators(node) else [])))
        node, bound = constructor, True
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [it for it in (arguments.vararg, arguments.kwarg) if it is not None]
    return [it.arg for it in [*named, *starred] if not (bound and it.arg in ("self", "cls"))]


def bases(node: ast.ClassDef) -> list[ast.ClassDef]:
    """The classes of divflow that it derives from."""
    names = [ast.unparse(base).partition("[")[0] for base in node.bases]
    return [CLASSES[name] for name in names if name in CLASSES and CLASSES[name] is not node]


def decorators(node: Callable) -> set[str]:
    """Their names."""
    return {ast.unparse(it).partition("(")[0] for it in node.decorator_list}


def fields(node: ast.ClassDef) -> list[str]:
    """The names that it annotates, those left out that belong to the class or are made by it."""
    found = [it for it in node.body if isinstance(it, ast.AnnAssign) and isinstance(it.target, ast.Name)]
    return [
        it.target.id
        for it in found
        if "ClassVar" not in ast.unparse(it.annotation) and "init=False" not in ast.unparse(it.value or it.target)
    ]


PACKAGES = [name for name in FILES if (ROOT / name.replace(".", "/")).is_dir()]
OFFERED = {name for package in PACKAGES for name in exported(FILES[package])}


def faults(node: Callable, bound: bool) -> Iterator[str]:
    """What is wrong with a docstring; of a method that is bound `self` and `cls` are no arguments."""
    docstring = ast.get_docstring(node)
    if not docstring:
        yield "no docstring"
        return
    first, _, rest = docstring.partition("\n")
    if not (first.endswith(".") and len(first) <= 120) or (rest.strip() and not rest.startswith("\n")):
        yield f"the first line is no sentence of at most 120 characters, {len(first)}: {first}"
    explained, known = section(docstring, "Args"), parameters(node, bound)
    if explained and sorted(explained) != sorted(known):
        yield f"Args has {explained}, and the signature {known}"
    named = section(docstring, "Attributes")
    if known and not (explained or named) and node.name in OFFERED and not bound:
        yield f"no Args, though a package offers it: {known}"
    tuples = isinstance(node, ast.ClassDef) and "NamedTuple" in [ast.unparse(it) for it in node.bases]
    if tuples and named and sorted(named) != sorted(fields(node)):
        yield f"Attributes has {named}, and the tuple {fields(node)}"


@pytest.mark.parametrize("module", sorted(name for name, tree in FILES.items() if exported(tree)))
def test_public_names_are_documented(module):
    found = [f"{name}: {fault}" for name, node in public(FILES[module]) for fault in faults(node, "." in name)]
    assert not found, "\n".join(found)
