"""Every block of Python of the guide runs, every other command composes (`test_guide.py` runs all); tables are narrow, and errors explained."""

import ast
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import urlsplit

import pytest
from documents import blocks, check_printed, check_table, commands, overrides, played, run_python, unknown
from run import FAST, ROOT, SMALL_TOY, config

from divflow.runs.experiment import train

PAGES = sorted((ROOT / "docs").rglob("*.md"))
ELSEWHERE = "own_package.md"  # whose blocks are run in the folder that it is about (tests/test_own_package.py)
BY_NAME = {str(page.relative_to(ROOT / "docs")): page for page in PAGES}
# Their sections need packages of their own: tests/test_migration.py and tests/test_works_with.py run these one by one.
BY_SECTION = ("migration.md", "works_with.md")
COMMANDS = sorted({command for page in PAGES if page.name != ELSEWHERE for command in commands(blocks(page))})
# Its blocks train models of other libraries, which take long to import.
LONG = ["elsewhere.md"]


def test_nothing_is_left_out():
    assert COMMANDS
    for page in PAGES:
        found = blocks(page)
        assert 2 * len(found) == sum(line.lstrip().startswith("```") for line in page.read_text().splitlines()), page
        languages = [language for language, _ in found]
        assert set(languages) <= {"python", "bash", "text", *(["yaml"] if page.name == ELSEWHERE else [])}, page
        # What is printed stands after what prints it.
        assert all(before in ("python", "bash") for before, it in pairwise(["", *languages]) if it == "text"), page
        assert not unknown(found, ROOT), page


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
        for name, page in BY_NAME.items()
        if "```python" in page.read_text() and name not in (ELSEWHERE, *BY_SECTION)
    ],
)
def test_python_blocks_of_a_page_in_their_order(name, tmp_path, monkeypatch):
    """They print what the page shows; a run that they load is made first."""
    monkeypatch.chdir(tmp_path)
    if any(language == "python" and "outputs/latest" in code for language, code in blocks(BY_NAME[name])):
        train(config(*FAST, *SMALL_TOY, f"output_dir={tmp_path}/outputs/latest"))
    missing = run_python(BY_NAME[name])["missing"]
    if missing:
        pytest.skip(f"all ran but the blocks that import {', '.join(sorted(missing))}")


@pytest.mark.slow
def test_getting_started_as_it_stands(tmp_path, monkeypatch):
    """Its commands, too, of which the page shows the end."""
    monkeypatch.chdir(tmp_path)
    page = BY_NAME["start.md"]
    shell = {code for language, code in blocks(page) if language == "bash"}
    for code, printed, shown in played(page, True, {}):
        if shown is not None:
            (check_table if code in shell else check_printed)(printed, shown)


SHOWN = "┃ quantity ┃ value ┃ unit ┃\n│ a │ 1.50 ± 0.02 │ nats │\n│ b │ 2.00 │ nats │\n│ evaluations │ 61.5 │ solve │\n"


@pytest.mark.parametrize(
    "other", [("1.50", "1.57"), ("2.00", "1.94"), ("61", "12"), ("┃ quantity", "In a folder\n┃ quantity"), ("━", "━━")]
)
def test_another_machine_may_print_a_little_else(other):
    check_table(SHOWN.replace(*other), SHOWN)
    check_printed("tensor([-0.1234,  1.0000])\n", "tensor([-0.1235, 1.009])\n".replace("1.009", "1.0090"))


@pytest.mark.parametrize(
    "other", [("1.50", "1.60"), ("2.00", "2.20"), ("│ b", "│ c"), ("nats", "bits"), ("│ a", "│ b")]
)
def test_tables_that_differ_are_seen(other):
    with pytest.raises(AssertionError, match=r"shown as|not printed"):
        check_table(SHOWN.replace(*other), SHOWN)


@pytest.mark.parametrize("printed", ["1.0200 nats", "1.0000 bits", "-1.0000 nats", "1.0000 nats\nmore", ""])
def test_lines_that_differ_are_seen(printed):
    with pytest.raises(AssertionError, match="show"):
        check_printed(printed, "1.0000 nats\n")


def test_a_block_without_its_library_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcfm", None)
    page = tmp_path / "page.md"
    page.write_text("```python\nimport torchcfm\n```\n\n```python\nleft = 1\n```\n")
    names = run_python(page)
    assert (names["missing"], names["left"]) == ({"torchcfm"}, 1)
    page.write_text("```python\nimport no_library_of_ours\n```\n")
    with pytest.raises(ModuleNotFoundError):
        run_python(page)


@pytest.mark.parametrize("command", COMMANDS[::2])
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


class Loaded(HTMLParser):
    """The addresses that a browser loads with a page: all but those of links to follow."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag != "a" and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses += [given[name] for name in ("src", "srcset", "href", "data") if given.get(name)]
        self.addresses += loaded_by_style(given.get("style") or "")

    def handle_data(self, text):
        if self.lasttag == "style":
            self.addresses += loaded_by_style(text)


def loaded_by_style(text):
    return [
        address
        for pair in re.findall(r"""url\(["']?([^"')]+)|@import\s+["']([^"']+)""", text)
        for address in pair
        if address
    ]


@pytest.mark.slow
def test_the_site_is_complete_without_the_internet(tmp_path):
    """Scripts, stylesheets, fonts and images are files of the site, and so is MathJax, which a script loads."""
    for module in ("mkdocs", "material", "mkdocstrings", "mathjax"):
        pytest.importorskip(module)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    asked = {sheet: loaded_by_style(sheet.read_text()) for sheet in tmp_path.rglob("*.css")}
    for page in tmp_path.rglob("*.html"):
        reader = Loaded()
        reader.feed(page.read_text())
        assert any(address.endswith("javascripts/mathjax.js") for address in reader.addresses), page
        asked[page] = reader.addresses
    assert len(asked) > len(PAGES)
    for file, addresses in asked.items():
        for address in map(urlsplit, addresses):
            if address.scheme != "data":
                assert address[:2] == ("", ""), (file, address)
                folder = tmp_path if address.path.startswith("/") else file.parent
                assert (folder / address.path.lstrip("/")).is_file(), (file, address)
    assert (tmp_path / "javascripts" / "tex-svg.js").is_file()
