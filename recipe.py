"""The hyper-parameters of a run: the recipes `paper` and `improved`.

    python train.py                                     PAPER, the default
    python train.py --recipe improved                   IMPROVED
    python train.py --recipe paper --smoothing 3        one field changed: an ablation
    dataclasses.replace(PAPER, smoothing=3.0)           the same in Python

Each field of `Recipe` is an option of train.py. `PAPER` has the network and the loss of the authors' code. Training and
preparation are our choice: that code has neither, and the paper's text was not at hand. `IMPROVED` states only the
fields that differ; docs/deviations.md gives the measured effect of each.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from cli import number_between

MODALITIES = ("fusion", "spectrum", "image")
IMAGE_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def _option(default: Any, parse: Any, text: str) -> Any:
    """A field with its default, its argparse type or tuple of choices, and its help text."""
    return dataclasses.field(default=default, metadata={"parse": parse, "help": text})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    # Network and loss: the authors' code (github.com/Gajiln/Spectrum-Image-Star-Classification).
    modality: str = _option("fusion", MODALITIES, "inputs of the network; fusion: both")
    image_backbone: str = _option("resnet152", IMAGE_BACKBONES, "torchvision ResNet of the image encoder")
    image_weights: str = _option("imagenet", str, "initial weights of the ResNet: imagenet, none, or a file's path")
    num_layers: int = _option(8, number_between(int, 1, 48), "layers of the Transformer")
    sic_weight: float = _option(1.0, number_between(float, 0, 1000), "weight of the contrastive loss")

    # Training: our choice. AdamW with warm-up and a cosine is what Transformers are usually trained with.
    num_epochs: int = _option(20, number_between(int, 1, 10**6), "passes over the training stars")
    batch_size: int = _option(32, number_between(int, 1, 10**6), "maximum batch size, over all processes")
    learning_rate: float = _option(1e-4, number_between(float, 1e-9, 10), "peak learning rate")
    warmup_epochs: float = _option(
        2.0, number_between(float, 0, 10**6), "epochs of warm-up, at most a third of the run"
    )
    weight_decay: float = _option(0.01, number_between(float, 0, 10), "AdamW's; not for biases, norms, embeddings")
    max_gradient_norm: float = _option(1.0, number_between(float, 1e-9, 1e9), "gradients are clipped to this norm")

    # Spectra, our choice: (flux / median − mean spectrum of the training stars) / one scale for all pixels.
    continuum_degree: int = _option(-1, number_between(int, -1, 20), "polynomial subtracted from spectra; -1: none")
    smoothing: float = _option(0.0, number_between(float, 0, 100), "sigma of the spectra's smoothing, pixels; 0: none")

    # Images of the training stars, our choice: as they are.
    rotate_and_flip: int = _option(0, (0, 1), "rotate images by quarter turns and mirror them, at random in each step")


PAPER = Recipe()
# F1 of spectra alone, mean over four sets of stars: 0.81 for PAPER, 0.88 for IMPROVED; see docs/accuracy.md.
IMPROVED = dataclasses.replace(PAPER, continuum_degree=3, smoothing=3.0, rotate_and_flip=1)
RECIPES = {"paper": PAPER, "improved": IMPROVED}


def option_name(field: str) -> str:
    """The option of a field of Recipe: "--epochs" of num_epochs."""
    return "--" + field.removeprefix("num_").replace("_", "-")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """--recipe, and an option for each field of Recipe that overrides it."""
    parser.add_argument(
        "--recipe", choices=RECIPES, default="paper", help="values of the options below that are not given"
    )
    group = parser.add_argument_group(
        "recipe",
        "each option overrides one field of the recipe; paper: network and loss of the authors' code, all else our "
        "choice (docs/deviations.md)",
    )
    for field in dataclasses.fields(Recipe):
        values = {name: getattr(recipe, field.name) for name, recipe in RECIPES.items()}
        improved = f"; improved: {values['improved']}" if values["improved"] != values["paper"] else ""
        text = f"{field.metadata['help']} (paper: {values['paper']}{improved})"
        parse = field.metadata["parse"]
        if isinstance(parse, tuple):
            kind = {"choices": parse, "type": type(parse[0])}
        else:
            kind = {"type": parse, "metavar": "X"}
        group.add_argument(option_name(field.name), dest=field.name, default=argparse.SUPPRESS, help=text, **kind)


def recipe_from(args: argparse.Namespace, **defaults: Any) -> Recipe:
    """The recipe that --recipe names, overridden by `defaults`, and these by the options on the command line."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe) if hasattr(args, field.name)}
    return dataclasses.replace(RECIPES[args.recipe], **(defaults | given))
