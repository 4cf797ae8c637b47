"""Modules that import each other, counting what is imported for type checkers alone."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest

grimp = pytest.importorskip("grimp")


def test_no_modules_import_each_other_not_even_for_types():
    graph = grimp.build_graph("fourbit", exclude_type_checking_imports=False, cache_dir=None)
    imports = {
        module: {other for other in graph.find_modules_directly_imported_by(module) if module != "fourbit"}
        for module in graph.modules
    }
    assert len(imports) > 250
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))
