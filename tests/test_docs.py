"""Every code block of the guide runs or, if it is a command, composes; tables are narrow, and every error is explained."""

import ast
import re

import pytest
from covering import thinned
from documents import blocks, commands, overrides, run_python, unknown
from run import ROOT, config

PAGES = sorted((ROOT / "docs").rglob("*.md"))
ELSEWHERE = "own_package.md"  # whose blocks are run in the folder that it is about (tests/test_own_package.py)
BY_NAME = {str(page.relative_to(ROOT / "docs")): page for page in PAGES}
COMMANDS = sorted({command for page in PAGES for command in commands(blocks(page))})


def test_nothing_is_left_out():
    assert COMMANDS
    for page in PAGES:
        found = blocks(page)
        assert 2 * len(found) == sum(line.lstrip().startswith("```") for line in page.read_text().splitlines()), page
        assert {language for language, _ in found} <= {"python", "bash", *(["yaml"] if page.name == ELSEWHERE else [])}
        assert not unknown(found, ROOT), page


@pytest.mark.parametrize(
    "name", [name for name, page in BY_NAME.items() if "```python" in page.read_text() and name != ELSEWHERE]
)
def test_python_blocks_of_a_page_in_their_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(BY_NAME[name])


@thinned(command=COMMANDS)
def test_commands_compose(command, tmp_path):
    given = overrides(command)
    assert config(*given, f"output_dir={tmp_path}").output_dir == str(tmp_path)


def test_navigation_names_every_page():
    listed = (ROOT / "mkdocs.yml").read_text()
    assert all(f" {name}\n" in listed for name in BY_NAME)


def test_reference_has_every_public_module():
    """Those of the first level, and every package below; a package shows what its `__all__` takes from its files."""
    source = ROOT / "divflow"
    files = {*source.glob("*.py"), *source.rglob("*/__init__.py")} - {source / "__init__.py", source / "__main__.py"}
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files}
    referenced = {
        line[4:] for page in PAGES for line in page.read_text().splitlines() if line.startswith("::: divflow.")
    }
    assert modules <= referenced, modules - referenced


def table_widths(text):
    """The number of columns of each table, by its line of dashes."""
    return [line.count("|") - 1 for line in text.splitlines() if re.fullmatch(r"\|[-:| ]+\|", line)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_tables_have_at_most_five_columns(page):
    assert max(table_widths(page.read_text()), default=0) <= 5


# These are raised and caught within the package.
CAUGHT = {"StaleError", "Unconverged"}


def derived(*roots):
    """The classes of divflow that derive from these, by name."""
    classes = [
        (node.name, {ast.unparse(base).rpartition(".")[2] for base in node.bases})
        for file in (ROOT / "divflow").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    names = set(roots)
    while more := {name for name, bases in classes if bases & names} - names:
        names |= more
    return names - set(roots)


def test_troubleshooting_names_every_error_and_warning():
    """In a table, with what it means and what to do."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    explained = {name for row in rows if len(row) == 3 for name in re.findall(r"`(\w+)`", row[0])}
    needed = derived("DivflowError", "Warning", "UserWarning") - CAUGHT
    assert {"FieldError", "RuleError", "QuadratureWarning"} <= needed
    assert needed <= explained, needed - explained
