import pytest
import torch
from torch import nn

from fourbit import models
from fourbit.errors import UserError
from fourbit.models._mobilenet import MobileNetV2

# name: (channels, image size, parameters, MACs) for 10 classes; for ImageNet, 1000 classes: the counts of torchvision's
# documentation (its "GFLOPS" are multiply-accumulates: 0.71, 1.81, 4.09, 0.30).
LARGE = {
    "alexnet": (3, 224, 61_100_840, 714_188_480),
    "mobilenet_v2_imagenet": (3, 224, 3_504_872, 300_774_272),
    "resnet18_imagenet": (3, 224, 11_689_512, 1_814_073_344),
    "resnet50_imagenet": (3, 224, 25_557_032, 4_089_184_256),
}
# For small images, 10 classes: Parameters are the published counts of the CIFAR
# variants; MACs follow from the shapes and agree with the published 0.041G, 0.56G, 1.30G, 0.31G, 0.89G,
# 1.52G, 2.51G to the digits given.
EXPECTED = {
    "densenet121": (3, 32, 6_956_298, 888_350_720),
    "digits_cnn": (1, 8, 12_890, 444_032),
    "googlenet": (3, 32, 6_166_250, 1_521_756_160),
    "mobilenet_v2": (3, 32, 2_296_922, 91_154_944),
    "resnet20": (3, 32, 269_722, 40_551_040),
    "resnet29": (3, 32, 313_114, 47_106_560),
    "resnet18": (3, 32, 11_173_962, 555_422_720),
    "resnet50": (3, 32, 23_520_842, 1_297_829_888),
    "resnet101": (3, 32, 42_512_970, 2_509_983_744),
    "vgg16": (3, 32, 14_728_266, 313_201_664),
}


SAME_BLOCKS = ("resnet101", "resnet18_imagenet", "resnet50_imagenet", "mobilenet_v2_imagenet")
"""As resnet50, resnet18 and mobilenet_v2 have; more of them, or behind another stem."""
every_kind = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SAME_BLOCKS else ()) for n in models.names("image")]
)


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    macs = 0

    def add(layer, _, y):
        nonlocal macs
        macs += y.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return macs


def weight_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_every_model_in_the_catalogue_has_an_expected_size_here():
    assert set(models.names("image")) == set(EXPECTED) | set(LARGE)


@pytest.mark.parametrize("name", models.names("image"))
def test_parameters_and_macs_are_the_published_ones(name):
    channels, size, num_parameters, num_macs = {**EXPECTED, **LARGE}[name]
    num_classes = 1000 if name in LARGE else 10
    model = models.build(name, num_classes=num_classes, in_channels=channels, image_size=size)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert count_macs(model, torch.zeros(1, channels, size, size)) == num_macs


@every_kind
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 13), (1, 28)])
def test_logits_come_out_for_any_image_size_from_the_smallest_on(name, channels, size):
    size += models.min_image_size(name) - 8
    model = models.build(name, num_classes=7, in_channels=channels, image_size=size).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


@every_kind
def test_a_small_step_reduces_the_loss_as_the_gradient_says(name):
    torch.manual_seed(0)
    size = models.min_image_size(name)
    x, y = torch.randn(8, 3, size, size).double(), torch.arange(8) % 4
    model = models.build(name, num_classes=4, image_size=size).double()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    before = nn.functional.cross_entropy(model(x), y)
    before.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    expected = 1e-7
    rate = expected / sum(float(g.square().sum()) for g in gradients if g is not None)
    torch.optim.SGD(model.parameters(), lr=rate).step()
    assert (before - nn.functional.cross_entropy(model(x), y)).item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", models.names("image"))
def test_the_stem_is_the_first_weight_layer_and_the_classifier_the_last(name):
    layers = weight_layers(models.build(name, num_classes=11, in_channels=5, image_size=64))
    assert isinstance(layers[0], nn.Conv2d)
    assert layers[0].in_channels == 5
    assert isinstance(layers[-1], nn.Linear)
    assert layers[-1].out_features == 11
    assert len(layers) >= 5


@every_kind
def test_the_same_torch_seed_gives_the_same_weights(name):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.build(name, num_classes=2, image_size=64).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_convolutions_start_with_he_deviation():
    torch.manual_seed(0)
    for layer in weight_layers(models.build("resnet18", num_classes=10)):
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 100_000:
            fan_out = layer.out_channels * layer.weight[0, 0].numel()
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)


def test_option_a_shortcut_subsamples_and_appends_zero_channels():
    shortcut = models.build("resnet20", num_classes=10).stages[1][0].shortcut
    x = torch.randn(2, 16, 5, 6)
    y = shortcut(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 3, 3)
    assert not y[:, 16:].any()
    assert not list(shortcut.parameters())


def test_an_unknown_name_gives_the_nearest_names():
    with pytest.raises(UserError, match=r"unknown model 'resnt20': did you mean 'resnet20'.*Valid names: .*vgg16"):
        models.build("resnt20", num_classes=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "at least 1 class"),
        ({"num_classes": 10, "in_channels": 0}, "1 for grey or 3 for colour"),
        ({"num_classes": 10, "image_size": 7}, "at least 8x8"),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_remedy(options, message):
    with pytest.raises(UserError, match=message):
        models.build("resnet20", **options)


def test_networks_of_another_width():
    narrow = models.build("resnet20?width=8", num_classes=10)
    assert [p.shape[0] for p in narrow.parameters() if p.ndim == 4][::6] == [8, 8, 16, 32]
    with torch.device("meta"):  # 1,968,680: the size that timm gives for mobilenetv2_050
        assert sum(p.numel() for p in MobileNetV2(1000, 3, large=True, multiplier=0.5).parameters()) == 1_968_680
    for name, message in (
        ("resnet20?width=0", "at least 1"),
        ("resnet20?width=0.5", "must be a whole number"),
        ("mobilenet_v2?width=x", "must be a number"),
        ("mobilenet_v2?width=-1", "a multiplier above 0"),
    ):
        with pytest.raises(UserError, match=message):
            models.build(name, num_classes=10)
    with pytest.raises(UserError, match="at least 8x8"):
        models.build("resnet20?width=8", num_classes=10, image_size=7)


@pytest.mark.parametrize(("name", "parameters"), [("lstm_200", 4_653_200), ("lstm_650", 19_780_400)])
def test_language_models_have_the_published_size_and_carry_their_state(name, parameters):
    torch.manual_seed(0)
    model = models.build(name, num_classes=10_000).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    tokens = torch.randint(0, 10_000, (6, 2))
    whole, _ = model(tokens)
    first, state = model(tokens[:2])
    second, _ = model(tokens[2:], state)
    assert whole.shape == (6, 2, 10_000)
    torch.testing.assert_close(torch.cat((first, second)), whole)


def test_the_acoustic_model_does_not_see_the_padding():
    torch.manual_seed(0)
    model = models.build("bilstm_speech", num_classes=10, in_channels=40).eval()
    assert sum(p.numel() for p in model.parameters()) == 1_362_442
    frames, lengths = torch.randn(9, 3, 40), torch.tensor([4, 9, 6])
    whole = model(frames, lengths)
    alone = model(frames[:4, :1], lengths[:1])
    torch.testing.assert_close(whole[:1], alone)
    frames[4:, 0] = 100.0
    torch.testing.assert_close(model(frames, lengths), whole)
