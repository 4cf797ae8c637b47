"""The package as a whole: what importing it costs, and that every public name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fourbit


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_else():
    loaded = run("import sys; before = set(sys.modules); import fourbit; print(*sorted(set(sys.modules) - before))")
    heavy = {"torch", "numpy", "matplotlib", "datasets", "accelerate", "sklearn", "cyclopts", "rich"}
    assert not heavy & set(loaded.split())


def test_the_library_needs_none_of_the_trainer_s_dependencies():
    code = "import sys, fourbit as fb; fb.convert, fb.observe, fb.explain; print(*sorted(sys.modules))"
    loaded = set(run(code).split())
    assert "torch" in loaded
    assert not {"matplotlib", "datasets", "accelerate", "sklearn", "jinja2", "safetensors", "cyclopts"} & loaded


def test_every_public_name_resolves_and_is_known_to_type_checkers():
    for name in fourbit.__all__:
        assert getattr(fourbit, name) is not None
    source = Path(fourbit.__file__).read_text()
    typed = set(re.findall(r" as (\w+)$", source.split("if TYPE_CHECKING:")[1].split("_HOME")[0], re.MULTILINE))
    assert set(fourbit._HOME) <= typed
    assert set(dir(fourbit)) == set(fourbit.__all__)


def test_an_unknown_attribute_is_an_attribute_error():
    assert not hasattr(fourbit, "no_such_name")


def test_a_first_step_needs_no_compiler():
    """Importing torch's compiler takes longer than the step."""
    code = """
import sys, torch, torch.nn as nn, fourbit as fb
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
fb.convert(net, "ibm2020")(torch.randn(2, 3, 8, 8)).sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
