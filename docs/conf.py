"""How `make docs` builds these pages."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import lightning_svd

project = "lightning-svd"
author = "the lightning-svd authors"
copyright = f"{author}, Apache-2.0"
version = release = lightning_svd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

add_module_names = False
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_use_unqualified_type_names = True

# Every name of our own must have its entry; those of other projects cannot be looked up without a network.
# Annotations of a constructor come as they are written where its class says what the arguments are.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|lightning|pathlib|collections|os)\..*|lightning_svd\.[\w.]+\.ModuleT|[mn]"),
    ("py:class", r"nn\.Module|Optimizer|ChooseRanks|MetricGuard|lightning_svd\.layers\.layer\.Repeats"),
]

html_theme = "furo"
html_title = f"lightning-svd {version}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f766e", "color-brand-content": "#0f766e"},
    "dark_css_variables": {"color-brand-primary": "#2dd4bf", "color-brand-content": "#2dd4bf"},
}
html_math_renderer = "mathml"
highlight_language = "none"
pygments_style, pygments_dark_style = "friendly", "github-dark"


def setup(app: Sphinx) -> None:
    """Formulas become MathML, which browsers draw by themselves: no script, no network."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-docstring", _escape_norms)


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _escape_norms(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write |u| for a norm, which reStructuredText would take for a substitution."""
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda match: match[1] or r"\|", line) for line in lines]
