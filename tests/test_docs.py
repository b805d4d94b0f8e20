"""Every code block of the guide runs or, if it is a command, composes."""

import sys
from itertools import pairwise

import pytest
from covering import thinned
from documents import blocks, check_printed, check_table, commands, overrides, played, run_python, unknown
from run import FAST, ROOT, SMALL_TOY, config

from divflow.runs.experiment import train

PAGES = sorted((ROOT / "docs").rglob("*.md"))
BY_NAME = {str(page.relative_to(ROOT / "docs")): page for page in PAGES}
COMMANDS = sorted({command for page in PAGES for command in commands(blocks(page))})
# Its blocks train models of other libraries, which take long to import.
LONG = ["elsewhere.md"]


def test_nothing_is_left_out():
    assert COMMANDS
    for page in PAGES:
        found = blocks(page)
        assert 2 * len(found) == sum(line.lstrip().startswith("```") for line in page.read_text().splitlines()), page
        languages = [language for language, _ in found]
        assert set(languages) <= {"python", "bash", "text"}, page
        # What is printed stands after what prints it.
        assert all(before in ("python", "bash") for before, it in pairwise(["", *languages]) if it == "text"), page
        assert not unknown(found, ROOT), page


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
        for name, page in BY_NAME.items()
        if "```python" in page.read_text()
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
