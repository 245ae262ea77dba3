"""Every choice is a field, every field an option of one meaning."""

import argparse
import dataclasses

import pytest

from recipe import IMPROVED, PAPER, RECIPES, Recipe, add_recipe_options, option_name, recipe_from

FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def parse(*options: object, **defaults: object) -> Recipe:
    parser = argparse.ArgumentParser()
    add_recipe_options(parser)
    return recipe_from(parser.parse_args(list(map(str, options))), **defaults)


def test_the_papers_recipe_is_the_default():
    assert parse() == PAPER == Recipe() and parse("--recipe", "improved") == IMPROVED
    network = PAPER.modality, PAPER.image_backbone, PAPER.image_weights, PAPER.num_layers, PAPER.sic_weight
    assert network == ("fusion", "resnet152", "imagenet", 8, 1.0)


def test_the_papers_recipe_filters_and_augments_nothing():
    assert (PAPER.smoothing, PAPER.continuum_degree, PAPER.rotate_and_flip) == (0, -1, 0)


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_one_option(name):
    choices, default = FIELDS[name].metadata["parse"], getattr(PAPER, name)
    value = choices[-1] if isinstance(choices, tuple) else {str: "none", int: 2, float: 0.5}[type(default)]
    for recipe in RECIPES:
        changed = parse("--recipe", recipe, option_name(name), value)
        assert changed == dataclasses.replace(RECIPES[recipe], **{name: value})
        assert type(getattr(changed, name)) is type(default)
    assert FIELDS[name].metadata["help"]


def test_the_improved_recipe_differs_where_the_help_says(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    differing = {name for name in FIELDS if getattr(PAPER, name) != getattr(IMPROVED, name)}
    assert differing and text.count("improved: ") == len(differing)
    assert not differing & {"modality", "image_backbone", "image_weights", "num_layers", "sic_weight"}


def test_options_override_defaults_and_defaults_override_the_recipe():
    assert parse(num_epochs=8).num_epochs == 8
    assert parse(option_name("num_epochs"), 3, num_epochs=8) == dataclasses.replace(PAPER, num_epochs=3)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--recipe", "best"),
        ("--modality", "both"),
        ("--learning-rate", "nan"),
        ("--batch-size", 2.5),
        ("--smoothing", -1),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_line(capsys, option, value):
    with pytest.raises(SystemExit) as exit_:
        parse(option, value)
    assert exit_.value.code == 2 and f"argument {option}: " in capsys.readouterr().err.splitlines()[-1]
