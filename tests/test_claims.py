"""The pages of results say what the kept runs give, and verdicts follow from numbers by the rule."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import _regions, energy, tables
from benchmarks.claims import _claim, _documents, _draw, _page, _write
from benchmarks.claims._claim import Claim, Verdict, every, judge, seeds

from fourbit.reproduce._statistics import paired

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return _write.claims()


def test_pages_index_documents_and_pictures_are_those_of_the_kept_runs():
    stale = [str(path.relative_to(ROOT)) for path in _write.stale()]
    assert not stale, f"run `python -m benchmarks.claims`: {', '.join(stale)}"


def test_tables_of_the_benchmarks_are_those_of_their_results():
    path = ROOT / "docs" / "performance.md"
    assert tables.filled(path, ROOT / "docs/results/performance") == path.read_text(), (
        "run `python -m benchmarks.tables`"
    )


def test_the_energies_of_the_page_of_hardware_are_what_the_model_estimates():
    kept = json.loads((energy.FOLDER / "energy.json").read_text())["joules_per_sample"]["resnet20"]
    found = energy.joules("resnet20", ("ibm2020",))
    assert found == pytest.approx({recipe: kept[recipe] for recipe in ("fp32", "ibm2020")}, rel=1e-9)


def test_a_plain_sentence_stands_only_while_its_verdicts_do(claims):
    assert "block scales" in _documents.headline(claims)
    other = part([0.1, -0.1, 0.0])
    changed = [replace(c, parts=(other,)) if c.name == "radix-4-or-blocks" else c for c in claims]
    assert "block scales" not in _documents.headline(changed)
    assert _documents.headline(claims).startswith(_documents.HEADLINES[0][0])


def test_runs_that_diverged_are_not_compared_and_decide_nothing(claims):
    runs, recipes = next(c for c in claims if c.name == "radix-4-or-blocks").runs[0]
    column = replace(runs.columns["ibm2020"], values={0: 40.0}, diverged=(1, 2))
    broken = replace(runs, columns=dict(runs.columns) | {"ibm2020": column})
    found = broken.part("ibm2020", "mxfp4-ceil-sr-g", least=0.0)
    assert found.said == "not compared: a run diverged" and found.verdict is Verdict.OPEN
    row = next(row for row in broken.table(recipes).rows if row[0] == "`ibm2020`")
    assert row[1:] == ("40.00", "40.00", "1 (2 diverged)", "-", "-")
    page = _page.page(replace(claim_of(found), runs=((broken, recipes),), beside=(broken.part("luq"),)), {})
    assert "**Cannot tell.** `ibm2020` - `mxfp4-ceil-sr-g`: not compared: a run diverged." in page


def test_every_region_of_a_document_is_written_by_one_of_the_scripts():
    known = {*_documents.REGIONS, *_documents.CITED, "claims-summary", "claims-headline", "claims-contents"}
    known |= {f"claims-{group.name.lower()}" for group in _claim.Group}
    for path in _documents.documents():
        if path.name not in ("performance.md", "conformance.md"):
            assert set(_regions.names(path.read_text())) <= known, path


def test_a_changed_number_is_found(claims, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(
        "so <!-- begin step-range -->from 9.99<!-- end step-range -->, and\n\n"
        "<!-- begin about-phases -->\n9.99\n<!-- end about-phases -->\n"
    )
    text = _documents.filled(document, claims)
    assert "9.99" not in text and "<!-- end step-range -->, and\n" in text
    assert "\n- [Two phases train better than one](" in text and " **holds**" in text


def test_a_picture_of_other_numbers_is_found(claims, tmp_path):
    claim = next(c for c in claims if c.name == "two-phases")
    _draw.draw(claim, tmp_path / "a.png")
    assert _draw.drawn(tmp_path / "a.png") == _draw.digest(claim)
    moved = replace(claim, parts=(replace(claim.parts[0], value=9.0),))
    assert _draw.digest(moved) != _draw.digest(claim) and _draw.drawn(tmp_path / "none.png") == ""


@pytest.mark.parametrize(
    ("low", "high", "least", "most", "verdict"),
    [
        (0.1, 0.2, 0.0, None, Verdict.HOLDS),
        (-0.1, 0.2, 0.0, None, Verdict.OPEN),
        (-0.2, -0.1, 0.0, None, Verdict.FAILS),
        (-0.9, 3.0, -1.0, None, Verdict.HOLDS),  # not more than a point behind
        (-0.5, 0.5, -1.0, 1.0, Verdict.HOLDS),  # equal within a point
        (0.5, 1.5, -1.0, 1.0, Verdict.OPEN),
        (1.1, 1.5, -1.0, 1.0, Verdict.FAILS),
        (None, None, 0.0, None, Verdict.OPEN),
        (0.0, 0.2, 0.0, None, Verdict.OPEN),
    ],
)
def test_a_verdict_is_the_position_of_the_interval_against_the_bound(low, high, least, most, verdict):
    assert judge(low, high, least, most) is verdict


def part(differences: list[float], least: float | None = 0.0) -> _claim.Part:
    found = paired(differences)
    assert found is not None
    return seeds("a - b", found, "points", least)


def claim_of(*parts: _claim.Part) -> Claim:
    return Claim("It is so.", parts, "", ())


def test_one_seed_decides_nothing():
    one = claim_of(part([5.0]))
    assert one.verdict is Verdict.OPEN and one.p is None and one.decides.said == "+5.00 points (one seed)"


def test_a_claim_holds_if_all_its_parts_do_and_falls_with_one_that_stands_among_them():
    holds, opens, fails = part([1.0, 1.1, 1.2]), part([1.0, -1.0, 0.5]), part([-1.0, -1.1, -1.2])
    assert claim_of(holds, holds).verdict is Verdict.HOLDS
    assert claim_of(holds, opens).verdict is Verdict.OPEN and claim_of(holds, opens).decides is opens
    assert claim_of(holds, fails).verdict is Verdict.FAILS and claim_of(holds, fails).decides is fails
    weak = part([-0.4, -0.9, -0.6])  # refutes alone, and not as one of four
    assert weak.verdict is Verdict.FAILS and claim_of(holds, opens, opens, weak).verdict is Verdict.OPEN


def test_the_p_of_a_part_agrees_with_its_verdict():
    for differences in ([0.1, 0.9, 0.5], [0.3, 0.5, 0.4], [-1.0, 1.0, 0.2]):
        for least in (0.0, -1.0, 0.4):
            found = part(differences, least)
            assert found.p is not None and (found.p < 0.05) == (found.verdict is not Verdict.OPEN)


def test_one_exception_refutes_every():
    assert every("layers", [True, True], "layers").verdict is Verdict.HOLDS
    refuted = every("layers", [True, False], "layers")
    assert refuted.verdict is Verdict.FAILS and refuted.said == "1 of 2 layers"


def test_claims_that_chance_alone_would_show_do_not_stand_together():
    found = [replace(claim_of(part([0.4, 0.9, 0.6])), name=str(i)) for i in range(20)]
    assert all(c.verdict is Verdict.HOLDS for c in found) and not any(_claim.together(found).values())
    assert _claim.together(found[:1]) == {"0": True}


def test_every_page_says_what_it_rests_on(claims):
    stands = _claim.together(claims)
    for claim in claims:
        text = _page.page(claim, stands)
        for heading in (
            "## What was measured",
            "## What it cannot tell",
            "## How it was measured",
            "To repeat it:",
            "![",
        ):
            assert heading in text, (claim.name, heading)
        assert claim.title.endswith("."), claim.name
        assert re.search(r"\*\*(Holds|Does not hold|Cannot tell)\.\*\*", text)
