"""Exports of what lies in a folder, a run's or one of transformers, and what an export has left of the accuracy."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.exports._export import export
from fourbit.exports._safetensors import load_packed
from fourbit.exports._target import TARGETS
from fourbit.train import load
from fourbit.train._folder import has_run, last_record, read_json
from fourbit.train._load import Trained

READ_BACK = ("onnx", "safetensors")
"""The layouts that `evaluate` can run."""


def export_folder(
    folder: Path,
    to: str,
    out: Path,
    data_dir: Path | None = None,
    model: str | None = None,
    fold_batch_norm: bool = False,
) -> Path:
    """Export the network of a run, or a model that fourbit.integrations.transformers has saved.

    Args:
        folder: of the run, or of the model.
        to, out, fold_batch_norm: as of `export`.
        data_dir, model: of a run, as of `fourbit.train.load`.

    Raises:
        UserError: neither, or as `export` and `load`.
    """
    TARGETS[to]  # an unknown name is found before anything is loaded
    if _is_of_transformers(folder):
        recipe = _config(folder)["quantization_config"]["recipe"]
        return export(_of_transformers(folder), out, to, recipe=recipe, fold_batch_norm=fold_batch_norm)
    trained = load(folder, data_dir=data_dir, model=model)
    final, environment = last_record(folder, "final") or {}, read_json(folder / "env.json")
    results = {key: final[key] for key in ("metric", "test_metric", "test_loss", "step") if final.get(key) is not None}
    plain = {key: value for key, value in environment.items() if isinstance(value, str | int | float)}
    settings = {"model": trained.config.model, "data": trained.config.data, "seed": trained.config.seed}
    return _export_run(trained, to, out, settings | results, plain, fold_batch_norm)


def _export_run(
    trained: Trained, to: str, out: Path, results: dict[str, Any], environment: dict[str, Any], fold_batch_norm: bool
) -> Path:
    data = trained.task.data
    size = getattr(data, "image_size", None)
    shape = None if size is None else (data.channels, size, size)
    recipe = trained.config.recipe
    name = recipe if isinstance(recipe, str) else recipe.name
    return export(
        trained.model,
        out,
        to,
        input_shape=shape,
        recipe=name,
        results=results,
        environment=environment,
        fold_batch_norm=fold_batch_norm,
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_of_transformers(folder: Path) -> bool:
    config = _config(folder)
    quantization = config.get("quantization_config")
    return "architectures" in config and isinstance(quantization, dict) and "recipe" in quantization


def _of_transformers(folder: Path) -> nn.Module:
    import transformers

    from fourbit.integrations import transformers as _  # noqa: F401  (makes the folder's quantization known)

    names = _config(folder)["architectures"]
    name = names[0] if isinstance(names, list) and names else names
    architecture = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise UserError(f"{folder} is of {names}, which is no model of transformers {transformers.__version__}.")
    _require_own_shards(folder)
    return architecture.from_pretrained(folder)


def _require_own_shards(folder: Path) -> None:
    """Reject a list of shards with files that are not in the folder: transformers would read them."""
    for file in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no list of shards: save the model again.") from error
        if strange := [s for s in shards if not isinstance(s, str) or s in ("", ".", "..") or "/" in s or "\\" in s]:
            raise UserError(f"{file} names {strange[0]!r}, which is no file of its folder: save the model again.")


def evaluate(
    folder: Path,
    to: str | None = None,
    data_dir: Path | None = None,
    model: str | None = None,
    fold_batch_norm: bool = False,
) -> tuple[str, dict[str, str]]:
    """The metric of a run's newest checkpoint on its test data: of its float weights, of the 4-bit network, of its export.

    Args:
        folder: of the run.
        to: "onnx", which onnxruntime runs, or "safetensors", whose weights the network takes in full precision, with inputs in
            full precision too. None: the first of both that can hold the network.
        data_dir, model: as of `fourbit.train.load`.
        fold_batch_norm: of the export.

    Returns:
        The metric's title, and {what: value}.

    Raises:
        UserError: as `load` and `export`, or a layout that cannot be run here.
    """
    if to is not None and to not in READ_BACK:
        TARGETS[to]
        raise UserError(f"evaluate runs what it exports, and {to} cannot be run here: take {' or '.join(READ_BACK)}.")
    if not has_run(folder) or _is_of_transformers(folder):
        raise UserError(f"there is no run in {folder}: name the folder of one.")
    trained = load(folder, data_dir=data_dir, model=model)
    plain = load(folder, data_dir=data_dir, model=model, recipe="fp32")
    found = {"float weights": _measured(plain, plain.model), "4-bit network": _measured(trained, trained.model)}
    with tempfile.TemporaryDirectory() as place:
        for name in (to,) if to else READ_BACK:
            try:
                served = _export_run(trained, name, Path(place) / name, {}, {}, fold_batch_norm)
            except UserError:
                if name == (to or READ_BACK[-1]):
                    raise
                continue
            found[f"export ({name})"] = _measured(trained, _served(name, served, plain.model))
            break
    return trained.task.metric.title, found


def _served(to: str, folder: Path, plain: nn.Module) -> nn.Module:
    if to == "onnx":
        return _Session(folder / "model.onnx")
    load_packed(plain, folder)
    return plain


class _Session(nn.Module):
    """An ONNX graph as a module."""

    def __init__(self, file: Path):
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("running ONNX needs the package onnxruntime: pip install 'fourbit[export]'.") from error
        self.session = onnxruntime.InferenceSession(file)

    def forward(self, x: Tensor) -> Tensor:
        """Of one tensor."""
        return torch.from_numpy(self.session.run(None, {"input": x.contiguous().numpy()})[0])


def _measured(trained: Trained, model: nn.Module) -> str:
    """The metric on the test data, as a run measures it."""
    task, config = trained.task, trained.config
    sums, findings = torch.zeros(3, dtype=torch.float64), []
    autocast = nullcontext() if config.autocast == "none" else torch.autocast("cpu", dtype=torch.bfloat16)
    model.eval()
    restore = task.snapshot()
    with torch.no_grad(), autocast:
        for batch in islice(task.batches("test"), config.max_test_batches):
            counts, items = task.evaluate(model, batch)
            sums += counts
            findings += items
    restore()
    loss, correct, count = sums.tolist()
    value = task.metric.of(loss / count, correct / count, task.judge(findings))
    return "unknown" if value is None else task.metric.text(value)
