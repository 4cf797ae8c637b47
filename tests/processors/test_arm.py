"""The portable kernels on 64-bit Arm: compiled by a cross compiler, run by an emulator, and the bits that x86 has."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fourbit.kernels.cpu._build import HERE, LIBRARY, BuildError, build, compiler

CROSS, EMULATOR, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", Path("/usr/aarch64-linux-gnu")
DRIVER = Path(__file__).parent / "driver.cpp"


def results(library: Path, compile_with: str, folder: Path, emulator: list[str]) -> list[str]:
    """The lines that the driver prints with this library."""
    program = folder / "driver"
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", f"-I{HERE / 'csrc'}", f"-Wl,-rpath,{library.parent}")
    command = [*compile_with.split(), *flags, str(DRIVER), str(library), "-o", str(program)]
    subprocess.run(command, check=True)
    ran = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True)
    return ran.stdout.splitlines()


@pytest.mark.slow
def test_the_portable_kernels_have_the_bits_of_x86_on_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for tool in (CROSS, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: apt-get install g++-aarch64-linux-gnu qemu-user")
    if platform.machine() != "x86_64" or not LIBRARY.exists():
        pytest.skip("no kernels for x86 to compare with")
    try:
        native = compiler()
    except BuildError as error:
        pytest.skip(str(error))
    (tmp_path / "x86").mkdir()
    (tmp_path / "arm").mkdir()
    expected = results(LIBRARY, native, tmp_path / "x86", [])
    monkeypatch.setenv("CXX", CROSS)
    library = build(tmp_path / "arm" / "kernels.so", machine="aarch64")
    found = results(library, CROSS, tmp_path / "arm", [EMULATOR, "-L", os.fspath(ROOT)])
    assert len(set(expected)) == len(expected) > 100
    assert [a for a, b in zip(found, expected, strict=True) if a != b] == []
