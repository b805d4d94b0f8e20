"""Every block of Python of the guide runs, and every other command composes; `test_guide.py` runs all of them."""

import pytest
from documents import blocks, commands, overrides, run_python, unknown
from run import ROOT, config

PAGES = sorted((ROOT / "docs").rglob("*.md"))
BY_NAME = {str(page.relative_to(ROOT / "docs")): page for page in PAGES}
COMMANDS = sorted({command for page in PAGES for command in commands(blocks(page))})


def test_nothing_is_left_out():
    assert COMMANDS
    for page in PAGES:
        found = blocks(page)
        assert 2 * len(found) == sum(line.lstrip().startswith("```") for line in page.read_text().splitlines()), page
        assert {language for language, _ in found} <= {"python", "bash"}, page
        assert not unknown(found, ROOT), page


@pytest.mark.parametrize("name", [name for name, page in BY_NAME.items() if "```python" in page.read_text()])
def test_python_blocks_of_a_page_in_their_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(BY_NAME[name])


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
