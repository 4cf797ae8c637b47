"""Runs that are going on: a picture that is replaced in a notebook, lines elsewhere."""

from __future__ import annotations

import json
import sys
import threading
import types
from pathlib import Path

import pytest

from fourbit.errors import UserError
from fourbit.report import watch, watching


def begin(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"recipe": "ibm2020", "seed": 0, "model": "m", "data": "d"}))
    (folder / "metrics.jsonl").touch()


def add(folder: Path, kind: str, step: int, **values) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, "step": step, "epoch": 0, **values}) + "\n")


def judged(folder: Path, kind: str, step: int) -> None:
    add(folder, kind, step, train_loss=1.5, test_loss=1.0, test_accuracy=0.5, metric="accuracy %", test_metric=50.0)


def waited(ready) -> None:
    for _ in range(3000):
        if ready():
            return
        threading.Event().wait(0.01)
    raise AssertionError("nothing came in 30 s")


@pytest.fixture
def notebook(monkeypatch):
    """Every picture and text that IPython was asked to show."""
    shown: list[tuple[str, dict]] = []

    class Handle:
        def update(self, bundle, raw):
            assert raw
            shown.append(("update", bundle))

    def display(bundle, raw, display_id):
        assert raw and display_id
        shown.append(("display", bundle))
        return Handle()

    module, inner = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    module.version_info = (9, 0)  # matplotlib asks
    module.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    inner.display = display
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    return shown


def test_one_picture_is_replaced_in_a_notebook_as_the_run_goes_on(notebook, tmp_path, capsys):
    folder = tmp_path / "a"
    with watching(folder, every=0.01):
        begin(folder)
        add(folder, "step", 1, loss=2.0)
        waited(lambda: notebook)
        judged(folder, "epoch", 2)
    kinds = [kind for kind, _ in notebook]
    assert kinds[0] == "display" and set(kinds[1:]) == {"update"}
    pictures = [bundle["image/png"] for _, bundle in notebook if "image/png" in bundle]
    assert all(png.startswith(b"\x89PNG") for png in pictures) and pictures[-1] != pictures[0]
    assert notebook[-1][1]["text/plain"] == "a  step 2  loss 2.0000  test accuracy 50.00 %"
    assert not capsys.readouterr().out


def test_elsewhere_every_news_is_a_line_and_the_end_of_the_run_is_the_end(tmp_path, capsys):
    folder = tmp_path / "a"

    def run():
        begin(folder)
        add(folder, "step", 1, loss=2.0)
        judged(folder, "final", 2)

    thread = threading.Thread(target=run)
    thread.start()
    watch(folder, every=0.01)
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "a  step 2  loss 2.0000  test accuracy 50.00 %  done" and len(lines) == len(set(lines))


def test_what_no_trainer_wrote_ends_the_view_and_not_the_run(tmp_path, capsys):
    begin(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not the object that a run writes"):
        watch(tmp_path, every=0.01)
    with watching(tmp_path, every=0.01):
        pass
    assert "nothing more is shown" in capsys.readouterr().err
    with pytest.raises(UserError, match="above 0"):
        watch(tmp_path, every=0)


@pytest.mark.slow
def test_a_kernel_of_jupyter_shows_one_picture_that_is_replaced(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    run = tmp_path / "a"
    begin(run)
    add(run, "step", 1, loss=3.0)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from fourbit.report import watching
from test_watch import add, judged
run = Path({str(run)!r})
import time
with watching(run, every=0.05):
    time.sleep(2)
    add(run, "step", 2, loss=2.0)
    judged(run, "epoch", 2)
    judged(run, "final", 2)
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    shown = [out.data for out in book.cells[0].outputs if out.output_type == "display_data"]
    assert len(shown) == 1 and shown[0]["image/png"]
    assert shown[0]["text/plain"].startswith("a  step 2  loss 2.0000  test accuracy 50.00 %")
