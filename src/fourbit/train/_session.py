"""From a configuration to everything that a training loop needs: data, model, optimizer, device.

The order matters for comparisons: the model is built from the seed alone, on the CPU and in full precision, and only then
converted. So all recipes start from the same weights, on every device, and see the same batches in the same order.

`accelerate.Accelerator` places model and optimizer, and with several processes (`accelerate launch`, `torchrun`) averages
their gradients; each process then takes every n-th image, or row of text, of each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from fourbit import recipes
from fourbit.errors import UserError
from fourbit.recipes import LossScaler, Scheduler
from fourbit.train._config import TrainConfig
from fourbit.train._environment import prepare_process, restarts
from fourbit.train._lars import Lars
from fourbit.train._muon import MuonWithAdamW, hidden_matrices
from fourbit.train.tasks import Batch, Task, make_task

if TYPE_CHECKING:
    from accelerate import Accelerator

OBSERVATIONS = 20
"""About so many points in time does a run observe, if nothing else is asked for."""

OBSERVE_AT_LEAST_EVERY = 100
"""Steps."""


@dataclass
class Session:
    """One run in memory.

    Args:
        config: validated, and with every None filled in that stands for another value.
        model: as the accelerator returned it; `bare` is the module itself.
        steps_per_epoch, total_steps: optimizer steps.
    """

    config: TrainConfig
    task: Task
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scaler: LossScaler | None
    scheduler: Scheduler | None
    steps_per_epoch: int
    total_steps: int

    @property
    def bare(self) -> nn.Module:
        """The module itself, without what distributed training wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def device(self) -> torch.device:
        """Where model and batches live."""
        return self.accelerator.device

    def train_groups(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """The batches of each optimizer step of an epoch, from step `start` of the epoch on."""
        size = self.config.grad_accumulation
        stream = self.task.batches("train", epoch, start * size)
        for _ in range(start, self.steps_per_epoch):
            yield list(islice(stream, size))

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of what is not quantized."""
        if self.config.autocast == "none":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def gather(self, items: list[Any]) -> list[Any]:
        """Those of all processes."""
        if self.accelerator.num_processes == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def total(self, numbers: Tensor) -> list[float]:
        """Sums over all processes, as numbers: the one synchronisation of a step."""
        return self.accelerator.reduce(numbers).tolist()  # type: ignore[union-attr]


def open_session(config: TrainConfig) -> Session:
    """Load the data, build and convert the model, make the optimizer. Writes nothing.

    Raises:
        UserError: data that cannot be loaded, a batch size that does not fit it, a recipe that does not fit the model.
    """
    prepare_process(config)
    accelerator = _accelerator(config)
    task = make_task(config, accelerator.device, accelerator.process_index, accelerator.num_processes)
    steps_per_epoch = _steps_per_epoch(config, task, accelerator.num_processes)
    task.check()
    torch.manual_seed(config.seed)
    model = task.build()
    recipes.convert(model, config.recipe, fuse=config.fuse, **config.convert_options())
    torch.manual_seed(config.seed)  # whatever building and converting drew
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.to(accelerator.device)
    model, optimizer = accelerator.prepare(model, _optimizer(config, model))
    total = config.epochs * steps_per_epoch
    total = total if config.max_steps is None else min(total, config.max_steps)
    if config.observe_every is None:
        config = replace(config, observe_every=min(-(-total // OBSERVATIONS), OBSERVE_AT_LEAST_EVERY))
    scheduler = recipes.scheduler(accelerator.unwrap_model(model), config.recipe, total)
    if scheduler is not None:
        scheduler.attach(optimizer)
    return Session(
        config=config,
        task=task,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scaler=recipes.loss_scaler(accelerator.unwrap_model(model), config.loss_scale_interval),
        scheduler=scheduler,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
    )


def _accelerator(config: TrainConfig) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
    except ImportError as error:
        raise UserError("training needs accelerate: pip install 'fourbit[train]'.") from error
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    # The state of accelerate is one per process; a run on another device than the run before needs a new one.
    if PartialState._shared_state and (str(PartialState().device) == "cpu") != cpu:
        AcceleratorState._reset_state(reset_partial_state=True)
    _join_restarted(cpu)
    # autocast is entered in `Session.autocast`, so that it does not become part of that state.
    return Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_steps=config.grad_accumulation)


def _join_restarted(cpu: bool) -> None:
    """Processes that torchrun has started again meet in a part of its store of their own: in the rest lie addresses of those
    that are gone (https://github.com/pytorch/pytorch/issues/135712), and who reads one waits half an hour."""
    if not restarts() or distributed.is_initialized():
        return
    store, rank, world = next(distributed.rendezvous("env://"))  # type: ignore[reportPrivateImportUsage]
    part = distributed.PrefixStore(f"attempt {restarts()}", store)  # type: ignore[reportPrivateImportUsage]
    distributed.init_process_group("gloo" if cpu else "nccl", store=part, rank=rank, world_size=world)


def _steps_per_epoch(config: TrainConfig, task: Task, num_processes: int) -> int:
    if config.batch_size % num_processes:
        below = config.batch_size // num_processes * num_processes
        choices = " or ".join(str(n) for n in (below, below + num_processes) if n)
        raise UserError(
            f"batch_size is {config.batch_size}, which {num_processes} processes cannot share equally: give {choices}."
        )
    batches = task.num_batches()
    steps = batches // config.grad_accumulation
    if steps == 0:
        raise UserError(
            f"grad_accumulation is {config.grad_accumulation}, but an epoch of {config.data} has only {batches} batches: "
            "give a smaller one."
        )
    return steps


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    groups = recipes.param_groups(model, config.weight_decay, config.alpha_weight_decay)
    assert config.lr is not None
    if config.optimizer == "muon":
        return MuonWithAdamW(groups, hidden_matrices(model), config.lr, (0.9, config.beta2))
    if config.optimizer == "lars":
        return Lars(groups, config.lr, config.momentum)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, lr=config.lr, betas=(0.9, config.beta2))
