"""How the documentation becomes a site: `make docs`. What can be generated, is: see generated_pages.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "src"))
os.environ["FOURBIT_CPU_KERNELS"] = "0"  # nothing here needs them

import generated_pages  # noqa: E402

import fourbit  # noqa: E402

generated_pages.write_all(HERE / "_generated")

project = "fourbit"
author = "The fourbit authors"
project_copyright = author
version = release = fourbit.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = [
    "results/**/runs/**",
    "results/reproduce/networks-*/**",
    "_build",
    "jupyter_execute",
    "**.ipynb_checkpoints",
]
suppress_warnings = ["toc.not_included"]  # tables of results are reached from their page
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks

html_theme = "furo"
html_title = "fourbit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app) -> None:
    """Docstrings are plain text: see docstrings.py."""
    import docstrings

    app.connect("autodoc-process-docstring", docstrings.to_restructured_text, priority=400)  # napoleon: 500
