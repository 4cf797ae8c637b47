"""The pages of the site: their code runs as it stands, the notebooks run, and what is generated is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "index.md", *sorted(DOCS.glob("concepts/*.md")), *sorted(DOCS.glob("howto/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, capsys):
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["look_inside", "own_recipe"])
def test_a_notebook_runs(name, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(DOCS / "notebooks" / f"{name}.ipynb", 4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    assert all(cell.outputs for cell in book.cells if cell.cell_type == "code" and "print" in cell.source)


@pytest.fixture
def generated(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import generated_pages

    yield generated_pages
    for name in ("generated_pages", "drawings"):
        sys.modules.pop(name, None)


def test_every_recipe_and_every_public_name_has_its_place(generated, tmp_path):
    import fourbit
    from fourbit import recipes

    for name, write in (("recipes", generated.write_recipes), ("api", generated.write_interface)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    index = (tmp_path / "recipes" / "index.md").read_text()
    assert all(f"[`{name}`]({name}.md)" in index for name in recipes.names())
    assert "x_fprop  uint4, PACT" in (tmp_path / "recipes" / "ibm2020.md").read_text()
    names = (tmp_path / "api" / "fourbit.md").read_text()
    assert all(f":: fourbit.{name}\n" in names for name in ("convert", "LayerSpec", "QuantSpec", "explain", "observe"))
    assert set(fourbit._HOME) - set(re.findall(r":: fourbit\.(\w+)\n", names)) == {"REUSE"}  # a value, not a class


def test_docstrings_become_what_sphinx_reads(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import docstrings

    lines = ["The sum `a|b` of |x|.", "", "    y = |x| * 2", "", "Args:", "    x: [B, N]*."]
    docstrings.to_restructured_text(None, "", "", None, None, lines)
    assert lines == ["The sum ``a|b`` of \\|x\\|.", "", "::", "", "    y = |x| * 2", "", "Args:", "    x: [B, N]\\*."]
