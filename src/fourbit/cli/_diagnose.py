"""The command that says what is wrong with runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fourbit.cli._app import app
from fourbit.cli._terminal import say
from fourbit.errors import UserError

EXIT_FINDINGS = 1


@app.command
def diagnose(*paths: Path, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """Say what is wrong with runs, since which step, in which layers, and what mends it.

    Reads what runs recorded, also of one that still goes on. Of several runs that differ by their seed alone, one that is
    unlike the others is found as well. Ends as a linter does: with 0 if nothing was found, with 1 otherwise.

    Args:
        paths: Run folders, or folders that contain run folders.
        as_json: Print a list of {run, findings} in JSON; a finding has kind, step, layers, value, sentence and remedy.
    """
    from fourbit.report import diagnose as examine

    if not paths:
        raise UserError("diagnose needs at least one run folder: fourbit diagnose runs/compare.")
    found = examine(paths)
    if as_json:
        say(
            json.dumps(
                [{"run": str(d.run.path), "findings": [f.as_dict() for f in d.findings]} for d in found], indent=2
            )
        )
    else:
        for diagnosis in found:
            say(f"{diagnosis.run.path}: {_count(len(diagnosis.findings))}")
            for finding in diagnosis.findings:
                say(f"  {finding.kind}: {finding.sentence}\n    {finding.remedy}")
    return EXIT_FINDINGS if any(d.findings for d in found) else 0


def _count(findings: int) -> str:
    return "nothing found" if not findings else f"{findings} finding{'s' if findings > 1 else ''}"
