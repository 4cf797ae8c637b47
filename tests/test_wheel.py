"""What is built for others: a wheel with the kernels in it for machines without a compiler, and a source distribution."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from instruction_sets import isas

from fourbit.kernels.cpu._build import BuildError, compiler

ROOT = Path(__file__).parents[1]
STEP = """
import torch, fourbit as fb
from torch import nn
from fourbit.kernels.cpu import library
from fourbit.kernels.cpu._library import ISAS
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
fb.convert(net, "ibm2020")
net(torch.randn(4, 3, 6, 6)).square().mean().backward()
assert all(p.grad.isfinite().all() for p in net.parameters())
print(fb.__file__)
loaded = library()
print(*([] if loaded is None else [name for name in ISAS if loaded.use_isa(name)]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what `python -m build` makes."""
    for needed in ("build", "hatchling"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"no package {needed}: pip install 'fourbit[dev]'")
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"FOURBIT_BUILD_KERNELS": "1"})
    return folder


def step_without_a_compiler(package: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Install the package into a new environment, whose dependencies are those of this one, and take a step: what it prints,
    and its warnings about kernels."""
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    (folder / "empty").mkdir()
    environment = {"PATH": str(folder / "empty"), "HOME": str(folder)}
    install = [
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        str(package),
    ]
    subprocess.run([sys.executable, *install], check=True, env=environment, capture_output=True)
    ran = subprocess.run(
        [python, "-W", "always", "-c", STEP], check=True, env=environment, capture_output=True, text=True, cwd=folder
    )
    return ran.stdout.splitlines(), [line for line in ran.stderr.splitlines() if "UserWarning: fourbit" in line]


def test_one_wheel_has_all_instruction_sets_and_needs_no_compiler(built: Path, tmp_path: Path):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "fourbit/kernels/cpu/_kernels.so" in archive.namelist()
    printed, warned = step_without_a_compiler(wheel, tmp_path)
    assert not warned and Path(printed[0]).is_relative_to(tmp_path)
    assert printed[1].split() == isas()


def test_a_source_distribution_installs_without_a_compiler_and_says_so_when_it_runs(built: Path, tmp_path: Path):
    (source,) = built.glob("*.tar.gz")
    printed, warned = step_without_a_compiler(source, tmp_path)
    assert Path(printed[0]).is_relative_to(tmp_path) and printed[1] == ""
    assert len(warned) == 1 and "fourbit runs without its CPU kernels" in warned[0]
