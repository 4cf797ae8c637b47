"""What Python knows of the C++ library's structures is what their header says: in its order, or not at all."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from fourbit.kernels.cpu._build import HEADER, HERE, BuildError, abi_of, compiler
from fourbit.kernels.cpu._library import Library
from fourbit.kernels.cpu._structures import ABI, CODES, FUNCTIONS, STRUCTURES, read

TEXT = HEADER.read_text()


def layout(structure) -> list[tuple[str, int, int]]:
    """Name, place and size of each field."""
    fields = [(name, getattr(structure, name)) for name, _ in structure._fields_]
    return [(name, field.offset, field.size) for name, field in fields]


def compiled(source: str, target: Path, *flags: str) -> None:
    """Compile a source text, or skip the test where there is no compiler."""
    path = target.with_suffix(".cpp")
    path.write_text(source)
    try:
        command = [*compiler().split(), "-std=c++17", f"-I{HERE / 'csrc'}", *flags, str(path), "-o", str(target)]
    except BuildError as error:
        pytest.skip(str(error))
    subprocess.run(command, check=True)


def test_fields_lie_where_the_compiler_puts_them(tmp_path: Path):
    lines = []
    for name, structure in STRUCTURES.items():
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        for field, _ in structure._fields_:
            of = f"{name}::{field.rstrip('_')}"
            place = f"offsetof({name}, {field.rstrip('_')})"
            lines.append(f'std::printf("{name}.{field} %zu %zu\\n", {place}, sizeof({of}));')
    source = '#include <cstddef>\n#include <cstdio>\n#include "common.h"\nusing namespace fourbit;\nint main() {\n'
    compiled(source + "\n".join(lines) + "\n}\n", tmp_path / "places")
    printed = subprocess.run([str(tmp_path / "places")], check=True, capture_output=True, text=True).stdout
    expected = []
    for name, structure in STRUCTURES.items():
        expected.append(f"{name} {ctypes.sizeof(structure)}")
        expected += [f"{name}.{field} {place} {size}" for field, place, size in layout(structure)]
    assert printed.splitlines() == expected and len(expected) > 300


def test_another_order_in_the_header_is_another_order_in_python():
    before, after = "  int64_t n;\n  float inv_scale, low, high;\n", "  float low, high, inv_scale;\n  int64_t n;\n"
    assert TEXT.count(before) == 1
    changed = read(TEXT.replace(before, after)).structures["Clip"]
    names = [name for name, _, _ in layout(changed)]
    assert names[:6] == ["x", "dtype", "low", "high", "inv_scale", "n"]
    assert sorted(names) == sorted(name for name, _, _ in layout(STRUCTURES["Clip"]))
    assert changed.low.offset == 12 and STRUCTURES["Clip"].low.offset == 28


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("float inv_scale, low, high;", "float low, inv_scale, high;"),
        ("int64_t n;", "int32_t n;"),
        ("kInt8 = 2, kUInt8 = 3", "kInt8 = 3, kUInt8 = 2"),
        ("float fourbit_clip(", "double fourbit_clip("),
        ("FOURBIT_API int32_t fourbit_products();\n", ""),
    ],
)
def test_a_library_of_another_header_is_refused(before, after, tmp_path: Path):
    assert before in TEXT
    other = abi_of(TEXT.replace(before, after))
    assert other != ABI
    source = f'#include <cstdint>\nextern "C" uint64_t fourbit_abi() {{ return {other}u; }}\n'
    compiled(source, tmp_path / "other.so", "-shared", "-fPIC")
    with pytest.raises(OSError, match="built from other sources"):
        Library(tmp_path / "other.so")


def test_comments_and_spaces_are_no_part_of_the_interface():
    assert abi_of(TEXT.replace("struct Clip {", "// said otherwise\nstruct Clip\n{")) == ABI
    assert abi_of(TEXT.replace("  float bound;", "  float bound;  // of the mask\n")) == ABI


@pytest.mark.parametrize(
    ("declaration", "said"),
    [
        ("struct A { long n; };", "the field 'long n' of A"),
        ("struct A { float *x; };", r"the field 'float \*x' of A"),
        ("struct A { float* x, y; };", r"the field 'float\* x, y' of A"),
        ("struct A { const float x; };", "the field 'const float x' of A"),
        ("struct A { Later b; }; struct Later { int32_t n; };", "the field 'Later b' of A"),
        ("struct A { int32_t n : 3; };", "the field 'int32_t n : 3' of A"),
        ("struct A { float x[2][3]; };", "the field"),
        ("struct A { struct { float y; } x; };", "a structure"),
        ("struct A : B { float x; };", "a structure"),
        ("enum Dtype : int32_t { kA, kB };", "the enumerator 'kA'"),
        ("FOURBIT_API long fourbit_f();", "a result long"),
        ("FOURBIT_API float* fourbit_f();", r"a result float\*"),
        ("FOURBIT_API void fourbit_f(long n);", "the argument 'long n' of fourbit_f"),
        ("FOURBIT_API void fourbit_f(const Unknown*);", r"the argument 'const Unknown\*' of fourbit_f"),
        ("FOURBIT_API void other_f();", "a function behind FOURBIT_API"),
    ],
)
def test_a_declaration_of_an_unknown_form_is_refused(declaration, said):
    with pytest.raises(ValueError, match=rf"^common.h has {said}"):
        read(declaration)


def test_functions_and_numbers_are_read_as_well():
    assert sorted(CODES.values()) == list(range(5))
    assert FUNCTIONS["moments"].arguments[1:3] == [ctypes.c_int32, ctypes.c_int64]
    assert FUNCTIONS["epilogue"].result is ctypes.c_double and FUNCTIONS["unpack"].result is None
    assert FUNCTIONS["multiply"].allocates and not FUNCTIONS["clip"].allocates
