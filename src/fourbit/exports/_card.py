"""README.md of an export: what the numbers are, where they come from, how to load them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fourbit._version import __version__
from fourbit.exports._fold import Folds
from fourbit.exports._target import Target
from fourbit.nn import quantized_layers

LOAD = {
    "onnx": "onnxruntime.InferenceSession('model.onnx').run(None, {'input': images})",
    "safetensors": "tensors = fourbit.exports.read_packed('model.safetensors')",
    "compressed-tensors": "model = transformers.AutoModelForCausalLM.from_pretrained('.')",
    "gguf": "reader = gguf.GGUFReader('model.gguf')",
}


def card(
    model: nn.Module,
    target: Target,
    recipe: str,
    results: Mapping[str, Any],
    environment: Mapping[str, Any],
    folds: Folds,
) -> str:
    """Markdown."""
    layers = {name: layer.spec for name, layer in quantized_layers(model).items() if not layer.spec.is_identity}
    by_kind: dict[tuple[str, str], list[str]] = {}
    for name, spec in layers.items():
        by_kind.setdefault((str(spec.w_fprop or "full precision"), str(spec.x_fprop or "full precision")), []).append(
            name
        )
    lines = [
        f"# {type(model).__name__} in 4 bits",
        "",
        f"Trained with fourbit {__version__}"
        + (f", recipe `{recipe}`" if recipe else "")
        + f"; exported to {target.name}, "
        f"{target.summary}.",
        "",
        "    " + LOAD[target.name],
        "",
        "## Layers",
        "",
        "| weight | input | layers |",
        "|---|---|---|",
        *(f"| {w} | {x} | {_listed(names)} |" for (w, x), names in by_kind.items()),
        "",
        "Everything else is in full precision.",
    ]
    if folds.of or folds.left:
        lines += ["", "## Batch normalization", ""]
        lines += [f"Folded into the weights and biases of {_listed(list(folds.of)) or 'no layer'}."]
        lines += [f"- `{name}` stays: it {reason}." for name, reason in folds.left.items()]
    for title, numbers in (("Results", results), ("Environment", environment)):
        if numbers:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in numbers.items()]
    return "\n".join(lines) + "\n"


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
