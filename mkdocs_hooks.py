"""What mkdocs.yml needs beside MkDocs: the site's own MathJax, and examples in docstrings as code."""

from importlib.resources import files
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# Of the package django-static-mathjax. This one draws its glyphs, and needs no fonts.
MATHJAX = files("mathjax") / "static" / "mathjax" / "es5" / "tex-svg.js"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add MathJax, which docs/javascripts/mathjax.js loads where a page has formulas."""
    files.append(File.generated(config, "javascripts/tex-svg.js", abs_src_path=str(MATHJAX)))


class Examples(Extension):
    """Renames the section `Example:` of docstrings to `Examples:`, which mkdocstrings reads as code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rename it in one docstring."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
