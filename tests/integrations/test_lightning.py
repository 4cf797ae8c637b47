"""Lightning's Trainer: converts before optimizers are made, resumes to the bit, with an average of weights too."""

from __future__ import annotations

import csv
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

import fourbit as fb  # noqa: E402
from fourbit.errors import UserError  # noqa: E402
from fourbit.integrations.lightning import FourBit  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, forgetful: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
        self.weights = [*self.net.parameters()] if forgetful else None

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.weights or fb.param_groups(self), lr=1e-2)


def batches():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 16, generator=generator), torch.randint(0, 5, (64,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)


def trainer(folder, *callbacks, epochs=2, logger=False):
    options = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder)}
    keep = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=logger, log_every_n_steps=4, callbacks=[*callbacks, keep], **options
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "averaged"),
    [
        ("ibm2020", False),
        pytest.param("ibm2020", True, marks=pytest.mark.slow),
        pytest.param("luq", True, marks=pytest.mark.slow),
        pytest.param("nvfp4-bf16-end", False, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_whole_run_to_the_bit(tmp_path, recipe, averaged):
    def run(**options):
        module = Module()
        others = [EMAWeightAveraging(decay=0.9)] if averaged else []
        trainer(tmp_path, FourBit(recipe), *others).fit(module, batches(), **options)
        return module.state_dict()

    whole = run()
    again = run(ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=False)
    assert whole.keys() == again.keys() and all(torch.equal(t, again[name]) for name, t in whole.items())
    outside = fb.convert(Module(), recipe)
    outside.load_state_dict(torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)["state_dict"])
    if not averaged:
        assert all(torch.equal(t, whole[name]) for name, t in outside.state_dict().items())


def test_layers_are_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, FourBit("ibm2020"), epochs=1, logger=logger).fit(Module(), batches())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert any(0 <= float(row["fourbit/net.2/g_dgrad/underflow"] or -1) < 1 for row in rows)


def test_what_cannot_be_trained_is_said(tmp_path):
    with pytest.raises(UserError, match="put FourBit before it"):
        trainer(tmp_path, EMAWeightAveraging(decay=0.9), FourBit("ibm2020")).fit(Module(), batches())
    with pytest.raises(UserError, match="name a recipe"):
        trainer(tmp_path, FourBit(None)).fit(Module(), batches())
    with pytest.raises(UserError, match="scales the loss"):
        trainer(tmp_path, FourBit("ibm2020-global-scale")).fit(Module(), batches())
    with pytest.raises(UserError, match="no optimizer has the clip values"):
        trainer(tmp_path, FourBit("ibm2020")).fit(Module(forgetful=True), batches())
    trainer(tmp_path, FourBit("ibm2020"), epochs=1).fit(Module(), batches())
    for other, message in (
        (FourBit("luq"), "not trained by luq in these layers"),
        (FourBit("ibm2020-no-tpr"), "recipe='ibm2020', not with recipe='ibm2020-no-tpr'"),
        (FourBit("ibm2020", seed=1), "with seed=0, not with seed=1"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, other).fit(Module(), batches(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=False)


def test_a_module_that_is_converted_otherwise_is_not_trained_under_the_recipes_name(tmp_path):
    module = Module()
    for _ in range(2):
        trainer(tmp_path, FourBit("mxfp4", skip="net.2")).fit(module, batches())  # the second finds it converted
    for other in (FourBit("nvfp4", skip="net.2"), FourBit("mxfp4")):
        with pytest.raises(UserError, match="the model is converted already, and net"):
            trainer(tmp_path, other).fit(module, batches())


def test_the_choice_of_layers_is_kept_and_a_checkpoint_of_another_is_refused(tmp_path):
    def fit(recipe="mxfp4", **options):
        callback, module = FourBit(recipe, skip=options.pop("skip", None)), Module()
        trainer(tmp_path, callback, epochs=options.pop("epochs", 2)).fit(module, batches(), **options)
        return module, callback.state_dict()

    whole, kept = fit(skip=lambda name, layer: layer.out_features == layer.in_features)
    assert set(fb.quantized_layers(whole)) == {"net.0"} and kept["skip"] == r"^(net\.2)$"
    old = {"ckpt_path": tmp_path / "epoch=0.ckpt", "weights_only": False}
    again, _ = fit(skip=lambda name, layer: name == "net.2", **old)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.state_dict().items())
    for other in ({}, {"skip": "net.0"}):
        with pytest.raises(UserError, match=r"trained with skip='\^\(net.*2\)\$', not with skip="):
            fit(**other, **old)
    with pytest.raises(UserError, match="only and skip choose layers for a recipe"):
        FourBit(None, skip="x")
