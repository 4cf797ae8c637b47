"""What the networks of `_architectures` go through, in the test as for the table."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fourbit as fb
from benchmarks._architectures import BATCH, LENGTH, WORDS, Case
from fourbit.recipes import GEMMS

STEPS = 30
CLEARLY = 0.25
"""How much of its loss a network in full precision must lose at least, so that the task says something."""
AS_FAR = 0.6
"""How much of that fall the same network must show in 4 bits at least."""


@dataclass(frozen=True)
class Coverage:
    """What a recipe does to a network.

    Args:
        layers: names of the products that fall under a rule of it.
        other: layers that multiply matrices and are not converted, with the reason that `explain` gives.
        share: of the multiply-accumulates of these layers in a training step, those with both operands in 4 bits.
    """

    layers: tuple[str, ...]
    other: Mapping[str, str]
    share: float


def expected_layers(model: nn.Module) -> set[str]:
    """The names of the products that are ours once the network is converted, told from the kinds of its modules."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.modules.conv._ConvNd, Conv1D)
    found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts") and hasattr(module, "is_transposed"):
            found |= {f"{name}.{'gate_up' if module.has_gate else 'up'}", f"{name}.down"}
    return found


def coverage(case: Case, recipe: str = "ibm2020") -> Coverage:
    """Which layers the recipe reaches, and how much of the work."""
    model = case.build()
    explanation = fb.explain(model, recipe, case.batch())
    found = explanation.layers
    stacks = {name for name, p in model.named_parameters() if p.dim() == 3}
    ours = [layer for layer in found if layer.rule != "-"]
    macs = {bits: 0 for layer in ours for bits in map(layer.bits, GEMMS)}
    for layer in ours:
        for gemm, count in (layer.num_macs or {}).items():
            macs[layer.bits(gemm)] += count
    names = tuple(layer.name for layer in ours)
    other = {layer.name: layer.note for layer in found if layer.rule == "-" and layer.note}
    other |= {
        m.name.rpartition(".")[0]: m.reason
        for m in explanation.matrices
        if m.reason.startswith("parameter of") and m.name in stacks
    }
    return Coverage(names, other, macs.get("4 x 4", 0) / max(1, sum(macs.values())))


def loss_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss that the network itself gives."""
    more = {"return_loss": True} if "labels" not in batch else {}
    return model(**batch, **more).loss


def train(model: nn.Module, case: Case, steps: int = STEPS) -> tuple[float, float]:
    """Learn the batch by heart with AdamW; the loss before, and the smallest of the last five: on four examples batch
    normalization lets single losses jump."""
    batch, losses = case.batch(), []
    optimizer = torch.optim.AdamW(fb.param_groups(model, 0.0), lr=case.lr)
    torch.manual_seed(0)
    for _ in range(steps):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses.append(loss_of(model, batch).item())
    return losses[0], min(losses[-5:])


def faults_of_fusing(case: Case) -> list[str]:
    """Differences between a network with fused chains and one without, of the results of two forward passes."""
    found = []
    for fuse in (True, False):
        model, batch, results = fb.convert(case.build(), "int4-fwd", fuse=fuse), case.batch(), []
        for _ in range(2):
            output = model(**batch)
            model.zero_grad()
            output.loss.backward()
            results.append(output.logits.detach())
        found.append(results)
    far = [float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]
    return [f"results differ by {worst:.1%}" for worst in far if not worst < 0.05]


def faults_of_restoring(model: Any, case: Case) -> list[str]:
    """`model`, converted and trained, against a network in full precision with its weights; it is restored then."""
    plain = case.build()
    weights = fb.float_state_dict(model)
    before = plain.state_dict()
    fb.restore(model)
    found = []
    if list(weights) != list(before) or list(model.state_dict()) != list(before):
        found.append("the names in the state_dict are not those of the network in full precision")
    plain.load_state_dict(weights)
    classes = [[(name, type(m).__module__, repr(type(m))) for name, m in net.named_modules()] for net in (model, plain)]
    if classes[0] != classes[1]:
        found.append("not every module has its class back")
    results = []
    for net in (model.eval(), plain.eval()):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(net(**case.batch()))
    first, second = (r.logits if "logits" in r else r.logits_per_image for r in results)
    return found + ([] if torch.equal(first, second) else ["the outputs are not the same"])


def faults_of_saving(model: Any) -> list[str]:
    """`model`, converted and trained, through save_pretrained and from_pretrained, against its weights in full precision."""
    wanted = fb.float_state_dict(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=dict(wanted))
        loaded = type(model).from_pretrained(folder).state_dict()
    if list(loaded) != list(wanted):
        return ["the names in the checkpoint are others"]
    return [f"{key} is another" for key in wanted if not torch.equal(loaded[key], wanted[key])]


def faults_of_generating(model: Any, case: Case) -> list[str]:
    """Three tokens after the batch's, from the converted network."""
    batch = {key: t for key, t in case.batch().items() if key != "labels"}
    start = {"causal": LENGTH, "seq2seq": 1, "speech": 0}[case.task]
    found = model.eval().generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    if found.shape != (BATCH, start + 3):
        return [f"generate gives {tuple(found.shape)}"]
    return [] if int(found.max()) < WORDS else ["generate gives words that do not exist"]
