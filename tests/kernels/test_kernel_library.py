"""Without the library, or with a wrong one, everything works through the reference; with it, from any thread or process."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from instruction_sets import instruction_set, isas
from kernel_cases import needs_library, numbers
from torch.utils.data import DataLoader, Dataset

import fourbit as fb
from fourbit import backends
from fourbit.kernels.cpu import _library, library
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._build import DOT_PRODUCT_FLAGS, HERE, INTEGER_ISAS, X86, BuildError, build, compiler
from fourbit.quantizers import Amax, QuantSpec, Rounding, quantize, quantize_pair

TRAIN = """
import torch, fourbit as fb
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
fb.convert(net, "ibm2020")
for _ in range(3):
    net(torch.randn(4, 3, 6, 6)).square().mean().backward()
assert all(p.grad.isfinite().all() for p in net.parameters())
"""

COUNT = "import fourbit as fb; print(len(fb.backends.kernels()))"
"""In a process of its own: other tests may have registered more in this one."""


@lru_cache
def run(code: str, **environment: str) -> tuple[str, list[str]]:
    """What a process prints, and its warnings about kernels."""
    ran = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return ran.stdout, [line for line in ran.stderr.splitlines() if "userwarning: fourbit" in line.lower()]


def test_a_missing_library_is_one_warning_and_everything_works(tmp_path: Path):
    code = TRAIN + "fb.explain(net, 'ibm2020'); print([s.detail for s in fb.backends.statuses()])"
    printed, warned = run(code, FOURBIT_CPU_LIBRARY=str(tmp_path / "nowhere.so"))
    assert len(warned) == 1 and "python -m fourbit.kernels.cpu._build" in warned[0]
    assert "not built" in printed


def test_switching_the_kernels_off_is_no_reason_to_warn():
    code = (
        TRAIN + "print(len(fb.backends.kernels()))\nfrom fourbit.cli import main; print('exit code', main(['doctor']))"
    )
    printed, warned = run(code, FOURBIT_CPU_KERNELS="0")
    assert not warned and printed.startswith("0\n")
    assert "switched off by FOURBIT_CPU_KERNELS=0" in printed and "exit code 0" in printed


def test_another_value_of_the_switch_is_one_warning_and_changes_nothing():
    printed, warned = run(COUNT, FOURBIT_CPU_KERNELS="off")
    assert len(warned) == 1 and "FOURBIT_CPU_KERNELS is 'off', but can be 0 (off) or 1 (on)" in warned[0]
    assert printed == run(COUNT)[0]


def why_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why this file is not used: what the one warning says then, as where there is none."""
    monkeypatch.setenv("FOURBIT_CPU_LIBRARY", str(path))
    loaded, reason = _library._load.__wrapped__()
    assert loaded is None
    return reason


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x02\x01\x01" + bytes(200)])
def test_a_file_that_is_no_library_is_not_used(tmp_path: Path, content, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "broken.so"
    broken.write_bytes(content)
    reason = why_not(broken, monkeypatch)
    assert "broken.so could not be used" in reason and "build it again" in reason


@pytest.mark.parametrize(
    "source", ['extern "C" int fourbit_abi() { return 0; }', 'extern "C" int other() { return 1; }']
)
def test_a_library_of_other_sources_is_not_used(tmp_path: Path, source, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "old.cpp").write_text(source)
    stale = tmp_path / "old.so"
    try:
        command = [*compiler().split(), "-shared", "-fPIC", str(tmp_path / "old.cpp"), "-o", str(stale)]
    except BuildError as error:
        pytest.skip(str(error))
    subprocess.run(command, check=True)
    assert "old.so could not be used" in why_not(stale, monkeypatch)


def test_doctor_and_explain_say_what_the_kernels_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code = (
        "from fourbit.cli import main\nmain(['doctor']); main(['explain', '--model', 'digits_cnn', '--input', '1x8x8'])"
    )
    printed, _ = run(code, FOURBIT_CPU_LIBRARY=str(tmp_path / "nowhere.so"))
    lines = [line for line in printed.splitlines() if "kernels" in line]
    assert len([line for line in lines if "cpu: not available, not built" in line]) == 2
    exec(code)
    lines = [line for line in capsys.readouterr().out.splitlines() if "kernels" in line]
    assert len([line for line in lines if backends.statuses()[0].detail in line]) == 2


def test_without_a_compiler_the_build_says_so_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    target = tmp_path / "kept.so"
    target.write_text("old")
    with pytest.raises(BuildError, match="set CXX"):
        build(target)
    monkeypatch.setenv("CXX", f"{sys.executable} -c raise(SystemExit(1))")
    with pytest.raises(BuildError):
        build(target)
    assert target.read_text() == "old"


def test_every_instruction_that_a_table_is_compiled_with_is_asked_for_before_it_is_used():
    """One that the processor lacks would end the process."""
    source = (HERE / "csrc" / "library.cpp").read_text()
    names = ("avx2", "avx_vnni", "avx512", "avx512_vnni", "dot_product")
    body = {name: source.split(f"bool has_{name}() {{")[1].split("}")[0] for name in names}
    asked = {name: set(re.findall(r'cpu_supports\("(\w+)"\)', text)) for name, text in body.items()}
    assert "has_avx2()" in body["avx_vnni"] and "1u << 4" in body["avx_vnni"] and "count(7, 1, &a," in body["avx_vnni"]
    asked["avx_vnni"] |= asked["avx2"] | {"avxvnni"}  # by its bit, which leaf 7, subleaf 1 has in eax
    assert "has_avx2()" in body["avx512"] and "has_avx512()" in body["avx512_vnni"]
    assert "has_avx512_vnni()" in body["dot_product"]
    asked["avx512"] |= asked["avx2"]
    asked["avx512_vnni"] |= asked["avx512"]
    asked["dot_product"] |= asked["avx512_vnni"]
    for name, flags in {**X86, **INTEGER_ISAS, "dot_product": DOT_PRODUCT_FLAGS}.items():
        needed = {flag[2:] for flag in flags if flag.startswith("-m") and "=" not in flag}
        assert needed <= asked.get(name, set()), name


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_no_entry_runs_products_where_there_are_none(isa):
    """However it is called: what the table in use has no instructions for is declined, and writes nothing."""
    with instruction_set(isa):
        loaded = library()
        assert loaded is not None
        if loaded.has_products:
            pytest.skip("these are its own products")
        a, b = torch.ones(4, 32, dtype=torch.bfloat16), torch.ones(32, 32, dtype=torch.int8)
        out, panels = torch.full((4, 32), 7.0), torch.full((2048,), 7, dtype=torch.int32)
        for integers in (0, 1):
            product = c.MatMul(a=a.data_ptr(), b=b.data_ptr(), out=out.data_ptr(), rows=4, columns=32, depth=32)
            product.scale = product.post = 1.0
            product.integers, product.panels = integers, panels.data_ptr()
            assert loaded.panel_count(ctypes.byref(product)) == 0
            assert loaded.pack_panels(ctypes.byref(product), panels.data_ptr()) == 0
            assert loaded.multiply(ctypes.byref(product)) == 0
        row = {
            "num": 1,
            "height": 1,
            "width": 2,
            "in_channels": 16,
            "out_height": 1,
            "out_width": 2,
            "out_channels": 16,
        }
        row |= {"kernel_height": 1, "kernel_width": 1, "stride_height": 1, "stride_width": 1}
        at_a, at_b, at_out = a.data_ptr(), b.data_ptr(), out.data_ptr()
        fprop = c.ConvFprop(x=at_a, w=at_b, out=at_out, scale=1.0, **row)
        assert loaded.conv_fprop(ctypes.byref(fprop)) == 0
        assert loaded.conv_wgrad(ctypes.byref(c.ConvWgrad(x=at_a, g=at_b, dw=at_out, **row))) == 0
        assert loaded.conv_dgrad(ctypes.byref(c.ConvDgrad(g=at_a, w=at_b, out=at_out, **row))) == 0
        assert bool((out == 7).all() and (panels == 7).all())


@needs_library
def test_an_instruction_set_that_is_not_there_is_not_used():
    loaded = library()
    assert loaded is not None
    before = loaded.isa
    for name in {*_library.ISAS, "sse9"} - set(isas()):
        assert not loaded.use_isa(name) and loaded.isa == before


@needs_library
def test_the_environment_chooses_the_instruction_set_of_a_process():
    printed, _ = run("from fourbit.cli import main; print('exit code', main(['doctor']))", FOURBIT_CPU_ISA="portable")
    assert "cpu: portable (set by FOURBIT_CPU_ISA)" in printed and "exit code 0" in printed


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set_of_the_processor_can_be_chosen(isa, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOURBIT_CPU_ISA", isa)
    with instruction_set(library().isa):  # the file is loaded once in a process: this comes back afterwards
        loaded, _ = _library._load.__wrapped__()
        assert loaded is not None and loaded.isa == isa
        assert loaded.has_products == (isa not in ("portable", "avx512"))


def test_an_unknown_instruction_set_in_the_environment_is_refused_in_one_sentence():
    ran = subprocess.run(
        [sys.executable, "-m", "fourbit", "doctor"],
        env={**os.environ, "FOURBIT_CPU_ISA": "avx51"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("fourbit: unknown value of FOURBIT_CPU_ISA 'avx51': did you mean 'avx512'")
    assert ran.stderr.count("\n") == 1


@needs_library
def test_an_instruction_set_that_the_processor_lacks_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOURBIT_CPU_ISA", "avx512")
    monkeypatch.setattr(_library.Library, "use_isa", lambda self, name: False)
    with pytest.raises(
        fb.errors.UserError,
        match=r"^FOURBIT_CPU_ISA is avx512, which this processor or build does not have: leave it out",
    ):
        _library._load.__wrapped__()


def test_importing_the_package_loads_no_library():
    code = "import sys, fourbit as fb; fb.convert; print('fourbit.kernels' in sys.modules)"
    assert run(code, FOURBIT_CPU_LIBRARY="nowhere.so") == ("False\n", [])


def work(x: torch.Tensor) -> list[torch.Tensor]:
    """A bit of everything that has a kernel."""
    even, odd = QuantSpec("fp4_r4_even", Amax()), QuantSpec("fp4_r4_odd", Amax())
    luq = QuantSpec("fp4_r2", Amax(), rounding=Rounding.STOCHASTIC)
    sawb = QuantSpec("int4_sym", fb.Sawb())
    int4 = fb.LayerSpec(x_fprop=sawb, w_fprop=sawb, g_dgrad=even, g_wgrad=odd)
    w = x[: 16 * 64].view(16, 64).clone().requires_grad_()
    y = fb.nn.functional.linear(x[: x.numel() // 64 * 64].view(-1, 64), w, None, int4)
    y.backward(y.detach())
    assert w.grad is not None
    pair = quantize_pair(x, even, odd)
    return [quantize(x, luq, key=3).q, pair[0].q, pair[1].q, pair[2], y.detach(), w.grad]


@needs_library
def test_several_python_threads_get_the_numbers_of_one():
    inputs = [numbers(50000, torch.float32, seed).clamp(-100, 100) for seed in range(6)]
    expected = [work(x) for x in inputs]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(10):
            if not all(map(torch.equal, work(inputs[i]), expected[i])):
                wrong.append(i)

    team = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert not wrong


@needs_library
def test_threads_that_are_first_to_need_a_kernel_find_all_of_them():
    code = """
import threading, torch, fourbit as fb
found, start = [], threading.Barrier(8)
def look():
    start.wait()
    found.append(len(fb.backends.kernels()))
team = [threading.Thread(target=look) for _ in range(8)]
[t.start() for t in team]; [t.join() for t in team]
print(*found)
"""
    assert set(run(code)[0].split()) == set(run(COUNT)[0].split())


class Samples(Dataset[list[torch.Tensor]]):
    """Samples that are quantized where they are loaded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return work(numbers(50000, torch.float32, index).clamp(-100, 100))


@needs_library
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_get_the_same_numbers(method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    torch.set_num_threads(2)
    data = Samples()
    expected = [data[i] for i in range(len(data))]  # the parent's team of threads exists before the fork
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method)
    for got, wanted in zip(loader, expected, strict=True):
        assert all(map(torch.equal, got, wanted))
