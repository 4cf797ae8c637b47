"""Recipes as TOML: what is written comes back the same, and what is wrong in a file is one sentence that says where."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

import fourbit as fb
from fourbit.errors import UserError
from fourbit.formats import FP4_R2
from fourbit.recipes import CATALOG, differences, parse_recipe, read_recipe, recipe_text, write_recipe
from fourbit.recipes._rule import Selector


@pytest.mark.parametrize("name", CATALOG)
def test_every_recipe_comes_back_as_it_was(name):
    recipe = CATALOG[name]
    back = parse_recipe(recipe_text(recipe))
    assert [rule.spec for rule in back.rules] == [rule.spec for rule in recipe.rules]
    for rule, other in zip(recipe.rules, back.rules, strict=True):
        assert (str(other), other.types, other.optional) == (str(rule), rule.types, rule.optional)
        assert (str(other.where), str(other.when)) == (str(rule.where), str(rule.when))
    assert replace(back, rules=recipe.rules) == recipe
    assert not differences(recipe, back)


def test_fields_that_no_recipe_of_the_catalogue_has_come_back_too():
    quant = fb.QuantSpec("int4_sym", fb.ClipValue(init=2.0, signed_format=None, learned=False))
    grad = fb.QuantSpec("fp4_r2", fb.Amax(), compensate="magnitude", rounding=fb.Rounding.STOCHASTIC, samples=2)
    tiles = fb.QuantSpec("fp4_e2m1", fb.BlockScale(), fb.Tile(None, 32), transform=fb.Hadamard(4, (1, -1, 1, 1), 7))
    sums = fb.Accumulation("fp16_169", chunk=None, rounding=fb.Rounding.STOCHASTIC)
    where = (fb.first(2) & ~fb.name(r"a\.\"b'|é\\")) | fb.recipes.last_share(1 / 7)
    rules = (
        fb.Rule(fb.LayerSpec(x_fprop=quant, g_dgrad=grad, g_wgrad=fb.REUSE, accumulation=sums), where=where),
        fb.Rule(
            fb.LayerSpec(x_fprop=tiles, w_fprop=tiles, w_dgrad=None, x_wgrad=None), types=(nn.Conv2d, fb.nn.MatMul)
        ),
        fb.Rule(fb.LayerSpec(), label='a "label"\n\x7f\t\\'),
        fb.Rule(None, optional=True),
    )
    recipe = fb.Recipe("mine", rules, phases=(fb.Phase(100, ("fprop",)), fb.Phase(200, ("x_wgrad",))))
    back = parse_recipe(recipe_text(recipe))
    assert [rule.spec for rule in back.rules] == [rule.spec for rule in rules]
    assert [str(rule.where) for rule in back.rules] == [str(rule.where) for rule in rules]
    assert (back.rules[1].types, back.rules[2].label, back.phases) == (rules[1].types, rules[2].label, recipe.phases)


def test_a_file_stands_wherever_a_name_does(tmp_path):
    path = tmp_path / "mine.toml"
    write_recipe(CATALOG["luq"], path)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert fb.convert(net, str(path))[1].spec == CATALOG["luq"].rules[-1].spec
    assert differences(read_recipe(path), CATALOG["ibm2020"])


def test_what_has_no_name_cannot_be_written():
    rule = fb.Rule(None, where=Selector("mine", lambda info: True))
    with pytest.raises(UserError, match="must be made of first, last"):
        recipe_text(fb.Recipe("a", (rule,)))
    with pytest.raises(UserError, match="is not in the catalogue"):
        recipe_text(fb.Recipe("a", (fb.Rule(fb.LayerSpec(fb.QuantSpec(replace(FP4_R2, summary="other")))),)))


GOOD = 'name = "a"\n[[rules]]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "recipe has no name: add it"),
        ('name = "a"', "recipe has no rules: add it"),
        ('name = "a"\nrules = []', "has no rules: give it at least one"),
        ("name = 3\nrules = []", "recipe.name is 3, but must be a text"),
        ("name = ", "is not a TOML file"),
        ("x = " + "[" * 5000, "is not a TOML file"),
        ('name = "a"\nrule = []', "unknown field of Recipe 'rule': did you mean 'rules'"),
        ('name = "a"\nrules = 3', "recipe.rules is 3, but must be a list"),
        ('name = "a"\nrules = [3]', "must be a table"),
        (GOOD, "recipe.rules[0] has no spec: add it"),
        (
            GOOD + 'spec = "int4"',
            "recipe.rules[0].spec is 'int4', but must be a table of a LayerSpec or 'full precision'",
        ),
        (GOOD + "spec.y_fprop = {}", "unknown field of LayerSpec 'y_fprop': did you mean"),
        (GOOD + 'spec.x_fprop = "reuse"', "x_fprop is 'reuse', but must be"),
        (GOOD + 'spec.x_fprop = { format = "int5" }', "unknown format 'int5': did you mean"),
        (GOOD + 'spec.x_fprop = { format = "int4", scaling = { c1 = 1 } }', "must be a table with a type"),
        (GOOD + 'spec.x_fprop = { format = "int4", scaling = "amax" }', "unknown scaling 'amax': did you mean 'Amax'"),
        (
            GOOD + 'spec.x_fprop = { format = "int4", scaling = { type = "FixedScale", value = "1" } }',
            "must be a number",
        ),
        (GOOD + 'spec.x_fprop = { format = "int4", rounding = "up" }', "unknown rounding 'up'"),
        (GOOD + 'spec.x_fprop = { format = "int4", samples = true }', "samples is True, but must be a whole number"),
        (GOOD + 'spec.x_fprop = { format = "int4", granularity = "rows" }', "granularity is 'rows', but must be"),
        (
            GOOD + 'spec.x_fprop = { format = "int4", granularity = { rows = 0, sums = 1 } }',
            "a tile has a positive number",
        ),
        (GOOD + 'spec.x_fprop = { format = "int4", transform = { size = 3 } }', "power of two"),
        (GOOD + 'spec.x_fprop = { format = "int4", transform = { size = 32 } }', "are rotated alike"),
        (GOOD + 'spec = "full precision"\ntypes = ["Conv4d"]', "unknown layer 'Conv4d'"),
        (GOOD + 'spec = "full precision"\nwhere = "__import__(\'os\')"', "must be made of first, last"),
        (GOOD + 'spec = "full precision"\nwhere = "first(1).test"', "must be made of first, last"),
        (GOOD + 'spec = "full precision"\nwhere = "first(\'a\')"', "must be made of first, last"),
        (GOOD + 'spec = "full precision"\nwhere = "name(\'(\')"', "is not a regular expression"),
        (GOOD + f'spec = "full precision"\nwhere = "{"~" * 5000}first(1)"', "must be made of first, last"),
        (GOOD + 'spec = "full precision"\n[[phases]]\nstart = 2.0\nhigh = ["fprop"]', "a phase starts at a fraction"),
        (GOOD + 'spec = "full precision"\n[[phases]]\nstart = 0.5\nhigh = [1]', "high[0] is 1, but must be a text"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence_that_says_where(text, words):
    with pytest.raises(UserError) as caught:
        parse_recipe(text, "mine.toml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("mine.toml")


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path / "no.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_recipe(tmp_path / "b.toml")
