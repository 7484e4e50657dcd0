"""The documentation, built by Sphinx from Markdown pages: `make docs`. Its reference pages are written from the package at each build."""

import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent))
import generate  # beside this file

import modeling_moshi_ttt

project = "Moshi-TTT"
author = copyright = "The Moshi-TTT authors"
release = version = modeling_moshi_ttt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # docstrings mark code with single backticks

autodoc_default_options = {"members": True, "ignore-module-all": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of named tuples are members already
napoleon_custom_sections = [(f"{part} of {call}", "params_style") for part in ("Args", "Raises") for call in ("forward", "generate")]

html_theme = "furo"
html_title = f"Moshi-TTT {release}"
html_copy_source = False
html_math_renderer = "mathml"


def math(self, node):
    """MathML, which browsers draw themselves: pages need neither a script nor a network."""
    self.body.append(tex2mathml(node.astext(), as_block=node.tagname == "math_block"))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    app.connect("builder-inited", lambda app: generate.write_pages(Path(app.srcdir) / "generated"))
    app.connect("autodoc-process-docstring", generate.plain_text, priority=400)  # before napoleon
