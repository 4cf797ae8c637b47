"""Runs with a fault put in on purpose, and healthy ones: what the diagnosis makes of them. docs/diagnose.md has the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FAULTS, HEALTHY, Fault, run_healthy, run_with, write_text

from fourbit.diagnosis import OUTLIER, RULES
from fourbit.report import diagnose

DOCS = Path(__file__).parents[2] / "docs" / "diagnose.md"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_fault_is_found_and_named(fault: Fault, tmp_path: Path):
    found = {finding.kind: finding for finding in diagnose(run_with(fault, tmp_path))[0].findings}
    assert fault.kind in found
    if fault.where:
        assert fault.where in found[fault.kind].layers


@pytest.mark.slow
@pytest.mark.parametrize("settings", HEALTHY, ids=lambda s: f"{s['model'][:6]}-{s['recipe']}-{s.get('seed', 0)}")
def test_a_healthy_run_raises_no_alarm(
    settings: dict[str, Any], tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
):
    folder = run_healthy(settings, tmp_path / "run", text)
    assert [str(finding) for finding in diagnose(folder)[0].findings] == []
    assert "warning" not in capsys.readouterr().out


def test_every_rule_has_a_run_with_its_fault_and_a_line_in_the_documentation():
    kinds = [rule.kind for rule in RULES]
    assert sorted(kinds) == sorted(fault.kind for fault in FAULTS)
    assert len(HEALTHY) >= 12
    assert re.findall(r"^\| `([a-z-]+)` \|", DOCS.read_text(), re.MULTILINE) == [*kinds, OUTLIER]
