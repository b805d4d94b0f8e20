"""Every code block of the guide runs or, if it is a command, composes."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest
from covering import thinned
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
