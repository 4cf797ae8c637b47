"""The translation Transformer: published size, padding and future that do not matter, and beam search."""

from __future__ import annotations

import itertools

import pytest
import torch

from fourbit import convert, models
from fourbit.errors import UserError
from fourbit.models import Transformer


def tiny(num_tokens: int = 7, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(num_tokens, 16, 2, 32, 2, max_length=12).eval()


def test_the_base_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = models.build("transformer_base", num_classes=37_000)
    # 37,000 x 512 shared; 6 x (4 d^2 + 4 d + 8 d^2 + 5 d + 4 d) and 6 x (8 d^2 + 8 d + 8 d^2 + 5 d + 6 d): "65 million"
    d = 512
    layers = 6 * (12 * d * d + 13 * d) + 6 * (16 * d * d + 19 * d)
    assert sum(p.numel() for p in model.parameters()) == 37_000 * d + layers == 63_082_496


def test_positions_are_those_of_the_paper():
    found = tiny().positions
    assert found.shape == (12, 16)
    for position, i in ((3, 0), (11, 5)):
        angle = torch.tensor(position / 10_000 ** (2 * i / 16))
        assert torch.allclose(found[position, 2 * i : 2 * i + 2], torch.stack((angle.sin(), angle.cos())), atol=1e-6)


@pytest.mark.parametrize("recipe", ["fp32", "ibm2020"])
def test_padding_and_later_tokens_change_nothing(recipe):
    model = tiny()
    convert(model, recipe)
    source, target = torch.randint(3, 7, (5, 2)), torch.randint(3, 7, (6, 2))
    model.train()
    model(source, target)  # the first batch decides the clip values
    model.eval()
    with torch.no_grad():
        whole = model(source, target)
        padded = model(torch.cat((source, torch.zeros(3, 2, dtype=torch.int64))), target)
        changed = model(source, torch.cat((target[:4], target[4:].flip(0))))
    assert torch.allclose(whole, padded, atol=1e-5)
    assert torch.allclose(whole[:4], changed[:4], atol=1e-5)


def log_probability(model: Transformer, source: torch.Tensor, sentence: tuple[int, ...]) -> float:
    target = torch.tensor([1, *sentence[:-1]]).unsqueeze(1)
    logits = model(source, target)[:, 0]
    logits[:, [0, 1]] = -torch.inf
    return float(logits.log_softmax(-1).gather(1, torch.tensor(sentence).unsqueeze(1)).sum())


@torch.no_grad()
def test_a_wide_beam_finds_the_most_probable_sentence_of_all():
    """Against all sentences of up to three tokens, which are cut off there."""
    for seed in range(4):
        model = tiny(6, seed)
        source = torch.tensor([[3], [5], [4], [2]])
        found = model.translate(source, beam_size=200, length_penalty=0.0, longest=3)[:, 0]
        words = (3, 4, 5)
        every = [(*head, 2) for n in range(3) for head in itertools.product(words, repeat=n)]
        every += list(itertools.product(words, repeat=3))
        best = max(every, key=lambda s: log_probability(model, source, s))
        assert tuple(found[found != 0].tolist()) == best


@torch.no_grad()
def test_greedy_takes_the_most_probable_token_each_time_and_batches_do_not_mix():
    model = tiny()
    source = torch.randint(3, 7, (4, 3))
    together = model.translate(source, 1, longest=6)
    for column in range(3):
        tokens = [1]
        while len(tokens) <= len(together) and tokens[-1] != 2:
            logits = model(source[:, column : column + 1], torch.tensor(tokens).unsqueeze(1))[-1, 0]
            logits[:2] = -torch.inf
            tokens.append(int(logits.argmax()))
        kept = together[:, column]
        assert kept[kept != 0].tolist() == tokens[1:]


def test_a_sentence_that_is_too_long():
    with pytest.raises(UserError, match="a sentence has 13 tokens, but this Transformer takes 12"):
        tiny()(torch.ones(13, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64))
