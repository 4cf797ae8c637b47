"""The tables of results that are kept in the repository are those of the runs beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fourbit.reproduce import reproduce

KEPT = Path(__file__).parents[2] / "docs" / "results" / "reproduce"
TABLES = sorted(path.parent.name for path in KEPT.glob("*/reproduced.md"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return shutil.copytree(KEPT, tmp_path_factory.mktemp("kept") / "reproduce")


@pytest.mark.parametrize("name", TABLES)
def test_a_kept_table_is_written_again_from_its_runs(name, copy):
    table, row, scale = name.split("-")
    kept = json.loads((KEPT / name / "reproduced.json").read_text())
    parts = kept if isinstance(kept, list) else [kept]
    columns = dict.fromkeys(column["recipe"] for part in parts for column in part["columns"])
    done = reproduce(table, row, scale=scale, seeds=(), columns=tuple(columns), out=copy, table_only=True)
    assert done.folder == copy / name
    for file in ("reproduced.md", "reproduced.json"):
        assert (done.folder / file).read_text() == (KEPT / name / file).read_text(), (
            f"fourbit reproduce {table} --row {row} --table-only"
        )
