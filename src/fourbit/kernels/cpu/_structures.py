"""The structures, numbers and functions of the C++ library, read from its own header.

`csrc/common.h` is the only place that says which fields a structure has, in which order. Each of its structures is here under
its name, a `ctypes.Structure` with the same fields; a field whose name is a word of Python has `_` behind it. A library that
was compiled from another header has another `ABI`, and is not used (`_library.py`).

    Clip(x=address, dtype=CODES[torch.float32], n=64, ...)      what is not given is 0, or null

The reader knows the few forms of declarations that the header keeps to, and refuses everything else: a declaration that is
misread would be memory that is overwritten.
"""

from __future__ import annotations

import ctypes
import keyword
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fourbit.kernels.cpu._build import HEADER, abi_of, declarations

_NUMBERS: dict[str, Any] = {
    "int8_t": ctypes.c_int8,
    "uint8_t": ctypes.c_uint8,
    "uint16_t": ctypes.c_uint16,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}

_STRUCTURE = re.compile(r"struct (\w+) \{ ([^{}]*?) ?\};")
_ENUM = re.compile(r"enum \w+ : int32_t \{ ([^{}]*?) \};")
_FUNCTION = re.compile(r"FOURBIT_API (FOURBIT_ALLOCATES )?([\w ]+?)(\*? )fourbit_(\w+)\(([^()]*)\);")
_FIELD = re.compile(r"(const )?(?:fourbit::)?(\w+)(\*)? (\w+(?:\[\d+\])?(?:, \w+(?:\[\d+\])?)*)")
_NAME = re.compile(r"(\w+)(?:\[(\d+)\])?")
_ENTRY = re.compile(r"(\w+) = (\d+)")
_ARGUMENT = re.compile(r"(?:const )?(?:fourbit::)?(\w+)(\*)?(?: \w+)?")


class Function(NamedTuple):
    """A function of the C ABI: types of its result and arguments, and whether it may run out of memory."""

    result: Any
    arguments: list[Any]
    allocates: bool


class Interface(NamedTuple):
    """What a header declares: structures and functions by name, and the numbers of its enumerations."""

    structures: dict[str, Any]
    functions: dict[str, Function]
    numbers: dict[str, int]


def read(header: str) -> Interface:
    """The declarations of a header.

    Raises:
        ValueError: a declaration of none of the known forms.
    """
    text = declarations(header)
    structures: dict[str, Any] = {}
    for name, body in _STRUCTURE.findall(text):
        if "(*" not in body:  # tables of functions stay in C++
            structures[name] = type(name, (ctypes.Structure,), {"_fields_": _fields(name, body, structures)})
    functions = {
        name: Function(_result(result, star), _arguments(name, arguments, structures), bool(allocates))
        for allocates, result, star, name, arguments in _FUNCTION.findall(text)
    }
    numbers = {name: int(value) for body in _ENUM.findall(text) for name, value in map(_entry, body.split(", "))}
    _require(len(functions) == len(re.findall(r"FOURBIT_API (?!extern)", text)), "a function behind FOURBIT_API")
    _require(text.count("struct ") == len(_STRUCTURE.findall(text)), "a structure")
    return Interface(structures, functions, numbers)


def _fields(structure: str, body: str, known: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        match = _FIELD.fullmatch(declaration)
        what = f"the field {declaration!r} of {structure}"
        _require(match is not None, what)
        assert match is not None
        constant, of, star, names = match.groups()
        _require(not (star and "," in names) and (star is not None or constant is None), what)
        kind: Any = ctypes.c_void_p if star else _NUMBERS.get(of) or known.get(of)
        _require(kind is not None, what)
        for name, length in _NAME.findall(names):
            name = f"{name}_" if keyword.iskeyword(name) else name
            found.append((name, kind * int(length) if length else kind))
    return found


def _result(name: str, star: str) -> Any:
    if star.strip():
        _require(name == "const char", f"a result {name}*")
        return ctypes.c_char_p
    _require(name == "void" or name in _NUMBERS, f"a result {name}")
    return _NUMBERS.get(name)


def _arguments(function: str, arguments: str, structures: dict[str, Any]) -> list[Any]:
    found = []
    for argument in filter(None, arguments.split(", ")):
        match = _ARGUMENT.fullmatch(argument)
        what = f"the argument {argument!r} of fourbit_{function}"
        _require(match is not None, what)
        assert match is not None
        of, star = match.groups()
        if not star:
            _require(of in _NUMBERS, what)
            found.append(_NUMBERS[of])
        elif of in structures:
            found.append(ctypes.POINTER(structures[of]))
        else:
            _require(of in _NUMBERS or of in ("void", "char"), what)
            found.append(ctypes.c_char_p if of == "char" else ctypes.c_void_p)
    return found


def _entry(text: str) -> tuple[str, str]:
    match = _ENTRY.fullmatch(text)
    _require(match is not None, f"the enumerator {text!r}")
    assert match is not None
    return match.group(1), match.group(2)


def _require(known: bool, what: str) -> None:
    if not known:
        raise ValueError(f"{HEADER.name} has {what} in a form that {__name__} does not know")


_text = HEADER.read_text()
ABI = abi_of(_text)
"""What `fourbit_abi()` of a library returns that was built from this header."""
STRUCTURES, FUNCTIONS, NUMBERS = read(_text)
globals().update(STRUCTURES)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The structure of that name."""


CODES = {
    torch.float32: NUMBERS["kFloat32"],
    torch.bfloat16: NUMBERS["kBFloat16"],
    torch.int8: NUMBERS["kInt8"],
    torch.uint8: NUMBERS["kUInt8"],
    torch.int32: NUMBERS["kInt32"],
}
"""Dtypes as the library numbers them."""
