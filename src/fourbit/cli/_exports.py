"""Commands that take a trained network out of training: export, evaluate."""

from __future__ import annotations

from pathlib import Path

from fourbit._files import require_inside
from fourbit.cli._app import app
from fourbit.cli._terminal import make_table, say, show


@app.command
def export(
    folder: Path,
    *,
    to: str = "onnx",
    out: Path | None = None,
    data_dir: Path | None = None,
    model: str | None = None,
    fold_batch_norm: bool = False,
) -> None:
    """Write a trained network as packed 4-bit weights with scales, in a layout that other programs read.

    What the layout cannot hold is refused, with the recipes that can. README.md in the export says what was written.

    Args:
        folder: Of a run that has a checkpoint, or of a model that fourbit.integrations.transformers has saved.
        to: onnx (INT4 weights and inputs), safetensors (packed codes and scales), compressed-tensors (a folder of transformers)
            or gguf (Q4_0 and MXFP4).
        fold_batch_norm: Fold batch normalization into the scales and biases of the layers in front of it; the runtime does one
            operation less. A warning names what stays, with the reasons. The numbers differ by roundings.
        out: Folder of the export, new or empty. None: export-FORMAT in the folder.
        data_dir: Folder with the files of the data set. None: as in the run.
        model: The run's network again, if it is your own (path/to/file.py:function): no code runs because a folder names it.
    """
    from fourbit.exports._runs import export_folder

    if out is None:
        out = folder / f"export-{to}"
        require_inside(folder, [out])
    say(f"folder: {export_folder(folder, to, out, data_dir, model, fold_batch_norm)}")


@app.command
def evaluate(
    run: Path,
    *,
    to: str | None = None,
    data_dir: Path | None = None,
    model: str | None = None,
    fold_batch_norm: bool = False,
) -> None:
    """Measure a run's network on its test data with float weights, in 4 bits, and as it is exported.

    Args:
        run: Folder of a run that has a checkpoint.
        to: onnx, which onnxruntime runs, or safetensors, whose 4-bit weights are multiplied by inputs in full precision. None:
            the first of both that can hold the network.
        fold_batch_norm: Measure the export with batch normalization folded.
        data_dir: Folder with the files of the data set. None: as in the run.
        model: The run's network again, if it is your own (path/to/file.py:function): no code runs because a folder names it.
    """
    from fourbit.exports._runs import evaluate as measure

    title, found = measure(run, to, data_dir, model, fold_batch_norm)
    table = make_table("network", title)
    for row in found.items():
        table.add_row(*row)
    show(table)
