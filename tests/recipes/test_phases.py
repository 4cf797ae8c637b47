"""Recipes whose precision changes over time: phases as data, by the number of the step, in eager and in compiled models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from fourbit import UserError
from fourbit.ops import REUSE, LayerSpec
from fourbit.quantizers import Amax, Hadamard
from fourbit.recipes import catalog
from fourbit.recipes.catalog import variants

INT4 = fb.QuantSpec("int4_sym", Amax())


def recipe(*phases, spec=None):
    return fb.Recipe("mine", (fb.Rule(spec or LayerSpec(*[INT4] * 6)),), phases=phases)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


def steps(model, scheduler, first, last, call=None):
    """Gradients of the steps from `first` to before `last`, without training."""
    found = []
    for step in range(first, last):
        if scheduler:
            scheduler.at(step)
        torch.manual_seed(step)
        x, y = torch.randn(16, 32), torch.randint(0, 8, (16,))
        model.zero_grad()
        F.cross_entropy((call or model)(x), y).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    return found


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_each_phase_computes_what_a_model_of_its_spec_does():
    by_hand = {
        0: LayerSpec(*[INT4] * 6),
        4: LayerSpec(None, None, INT4, INT4, INT4, INT4),
        8: LayerSpec(INT4, INT4, None, None, INT4, INT4),
    }
    phases = recipe(fb.Phase(0.4, ("fprop",)), fb.Phase(0.8, ("dgrad",)))
    model = fb.convert(network(), phases)
    found = steps(model, fb.scheduler(model, phases, 10), 0, 10)
    for step in range(10):
        spec = by_hand[max(start for start in by_hand if start <= step)]
        other = fb.convert(network(), recipe(spec=spec))
        assert same(found[step], steps(other, None, step, step + 1)[0]), step


def test_what_reused_a_raised_operand_is_quantized_as_before():
    rotated = fb.QuantSpec("int4_sym", Amax(), transform=Hadamard(16))
    spec = LayerSpec(rotated, rotated, INT4, REUSE, INT4, REUSE)
    raised = fb.Phase(1, ("fprop",)).applied(spec)
    assert raised == LayerSpec(None, None, INT4, INT4, INT4, INT4)
    again = fb.QuantSpec("int4_sym", Amax(), source="fprop")
    assert fb.Phase(1, ("x_fprop",)).applied(LayerSpec(INT4, INT4, x_wgrad=again)).x_wgrad == INT4


def test_a_training_that_is_resumed_goes_on_in_the_phase_of_its_step():
    phases = recipe(fb.Phase(3, ("fprop",)), fb.Phase(6, ("dgrad", "x_fprop")))
    model = fb.convert(network(), phases)
    whole = steps(model, fb.scheduler(model, phases, 9), 0, 9)
    for first in (2, 3, 5, 7):
        again = fb.convert(network(), phases)
        found = steps(again, fb.scheduler(again, phases, 9), first, 9)
        assert all(same(a, b) for a, b in zip(found, whole[first:], strict=True))


def test_a_compiled_model_changes_its_phase_and_computes_the_same():
    torch.compiler.reset()
    phases = recipe(fb.Phase(2, ("fprop",)), fb.Phase(4, ("dgrad", "wgrad")))
    eager, model = fb.convert(network(), phases), fb.convert(network(), phases)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = steps(eager, fb.scheduler(eager, phases, 6), 0, 6)
    found = steps(model, fb.scheduler(model, phases, 6), 0, 6, compiled)
    for a, b in zip(found, expected, strict=True):
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_clip_values_and_exponents_stay_through_a_phase_without_them():
    phases = fb.Recipe("mine", catalog.IBM2020.rules, phases=(fb.Phase(3, ("dgrad", "wgrad")),))
    model = fb.convert(network(), phases)
    scheduler = fb.scheduler(model, phases, 6)
    steps(model, scheduler, 0, 3)
    before = {k: v.clone() for k, v in model.state_dict().items() if "exponent" in k or "alpha" in k}
    assert before
    steps(model, scheduler, 3, 6)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    scheduler.at(0)
    steps(model, scheduler, 0, 1)


def test_the_published_recipes_with_phases_say_so():
    with_phases = {
        name: [str(p) for p in fb.recipes.get(name).phases] for name in fb.recipes.names() if name not in variants.NAMES
    }
    assert with_phases["nvfp4-bf16-end"] == ["from 82 % of the steps on: fprop in full precision"]
    assert {name for name, phases in with_phases.items() if phases} == {
        "luq-fnt",
        "nvfp4-bf16-end",
        "nvfp4-fqt-qaf",
        "nvfp4-fqt-trigger",
    }
    high = "dgrad, wgrad in full precision; learning rate up over 40 steps, then down (cosine)"
    assert with_phases["nvfp4-fqt-qaf"] == [f"from 90 % of the steps on: {high}"]
    noise = "once the gradient is below 1.73 times the noise of its rounding (measured every 100 steps)"
    assert with_phases["nvfp4-fqt-trigger"] == [f"{noise}: {high}"]


def test_explain_says_when_precision_changes():
    text = str(fb.explain(network(), "nvfp4-bf16-end"))
    assert "from 82 % of the steps on: fprop in full precision" in text


def test_phases_that_cannot_be_are_refused_in_a_sentence():
    for start in (0, 0.0, 1.0, -1, 1.5, True, "late"):
        with pytest.raises(UserError, match="a phase starts at a fraction of the training between 0 and 1"):
            fb.Phase(start, ("fprop",))
    with pytest.raises(UserError, match="raises products or slots, and 'forward' is none"):
        fb.Phase(0.5, ("forward",))
    with pytest.raises(UserError, match="needs something in full precision"):
        fb.Phase(0.5, ())
    with pytest.raises(UserError, match=r"its phases overlap, as one starts at 0\.5 and the next at 0\.5"):
        recipe(fb.Phase(0.5, ("fprop",)), fb.Phase(0.5, ("dgrad",)))
    with pytest.raises(UserError, match="all phases by fractions, or all by numbers of steps"):
        recipe(fb.Phase(0.5, ("fprop",)), fb.Phase(7, ("dgrad",)))
    phases = recipe(fb.Phase(50, ("fprop",)))
    with pytest.raises(UserError, match="starts at 50 never does in a training of 20 steps"):
        fb.scheduler(fb.convert(network(), phases), phases, 20)
    assert fb.scheduler(fb.convert(network(), "ibm2020"), "ibm2020", 20) is None


def test_gradient_noise_is_the_norm_of_what_rounding_adds():
    event = fb.GradientNoise()
    g = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]  # norm 5
    for noise, happened in ((2.88, False), (2.89, True)):  # 5 / sqrt(3) = 2.8868
        q = [g[0], g[1] + noise]
        assert event.happened(g, q) is happened
    assert fb.GradientNoise(ratio=0.1).happened(g, [g[0], g[1] + 2.9]) is False


def train(steps, resume_at=None, every=4, ratio=1e6):
    """Losses, the phase of each step and its share of the learning rate; with a checkpoint that is loaded on the way."""
    event = recipe(fb.Phase(fb.GradientNoise(every, ratio), ("dgrad", "wgrad"), fb.Rate(2)))
    drawn = fb.Recipe("mine", (fb.Rule(fb.recipes.get("nvfp4-fqt").rules[-1].spec),), phases=event.phases)

    def new():
        model = fb.convert(nn.Sequential(*network(), nn.Dropout(0.1), nn.BatchNorm1d(8)), drawn)
        return model, fb.scheduler(model, drawn, steps)

    model, scheduler = new()
    found = []
    for step in range(steps):
        if step == resume_at:
            states = model.state_dict(), scheduler.state_dict()
            model, scheduler = new()
            model.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        torch.manual_seed(step)
        x, y = torch.randn(16, 32), torch.randint(0, 8, (16,))
        torch.manual_seed(100 + step)
        phase = scheduler.at(step, lambda m=model, x=x, y=y: F.cross_entropy(m(x), y).backward())
        assert all(p.grad is None for p in model.parameters())
        share = scheduler.rate(step)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= (1.0 if share is None else share) * 0.1 * p.grad
                p.grad = None
        found.append((loss.item(), phase is not None, share))
    return found


def test_an_event_begins_its_phase_and_the_decision_survives_a_resume():
    whole = train(12)
    assert [begun for _, begun, _ in whole] == [False] * 4 + [True] * 8  # measured at step 4 for the first time
    shares = [share for *_, share in whole]
    assert shares[:6] == [None] * 4 + [0.5, 1.0] and shares[6] == 1.0 and shares[7] < 1.0
    for resume_at in (3, 4, 5, 9):
        assert train(12, resume_at) == whole


def test_measuring_changes_nothing_where_the_event_does_not_happen():
    assert train(12, every=4, ratio=1e-9) == train(12, every=100, ratio=1e-9)


def test_an_event_without_a_backward_pass_is_refused():
    event = recipe(fb.Phase(fb.GradientNoise(2), ("dgrad",)))
    scheduler = fb.scheduler(fb.convert(network(), event), event, 10)
    assert scheduler.at(0) is None and scheduler.at(1) is None
    with pytest.raises(UserError, match=r"call scheduler\.at\(step, backward\)"):
        scheduler.at(2)
    with pytest.raises(UserError, match="no phase can come after one that an event begins"):
        recipe(fb.Phase(fb.GradientNoise(2), ("dgrad",)), fb.Phase(0.5, ("dgrad",)))
    for make in (lambda: fb.GradientNoise(0), lambda: fb.GradientNoise(ratio=0.0)):
        with pytest.raises(UserError, match="measured every 1 or more steps"):
            make()
    for make in (lambda: fb.Rate(-1), lambda: fb.Rate(1.5), lambda: fb.Rate(2, "step")):
        with pytest.raises(UserError):
            make()


def test_learning_rates_of_phases_are_written_out():
    qaf, fnt = fb.Rate(40), fb.Rate(0.5, "linear")
    assert qaf.at(0, 140) == 1 / 40 and qaf.at(39, 140) == 1.0 and qaf.at(90, 140) == pytest.approx(0.5)
    assert [fnt.at(i, 10) for i in (0, 4, 5, 9)] == [0.2, 1.0, 1.0, pytest.approx(0.2)]
    assert qaf.at(9, 10) == 1.0  # a phase shorter than its warm-up


def test_a_loop_without_a_scheduler_is_refused_at_its_second_step():
    model = fb.convert(network(), "nvfp4-bf16-end")
    x = torch.randn(4, 32)
    model(x).sum().backward()
    with pytest.raises(UserError, match=r"has phases: make scheduler = fourbit\.scheduler"):
        model(x)
    assert model.eval()(x).isfinite().all()  # evaluation needs none
    scheduler = fb.scheduler(model.train(), "nvfp4-bf16-end", 100)
    scheduler.at(1)
    model(x).sum().backward()
    model(x)
