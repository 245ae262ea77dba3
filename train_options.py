"""The command line of train.py. It imports nothing heavy, so that --help and mistakes are answered at once."""

import argparse
import os
from pathlib import Path

from cli import ScriptParser, number_between
from recipe import add_recipe_options, recipe_from

DEMO_DIR = Path("demo")
DEMO_DEFAULTS = {"data_dir": DEMO_DIR / "stars", "output_dir": DEMO_DIR}
DEMO_RECIPE = {"num_epochs": 8, "image_weights": "none"}
NOT_GIVEN = object()
EVALUATE_OPTIONS = {"evaluate", "split", "data_dir", "num_workers", "device", "quiet"}


def parse_arguments(docstring: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The options of train.py. Beside its own attributes, the namespace has `recipe`, the whole Recipe; `recipe_name`,
    the value of --recipe; and `given`, which maps the attributes set on the command line to their options."""
    parser = make_parser(docstring)
    args = parser.parse_args(argv)
    # Parsed again with other defaults: whatever is not NOT_GIVEN was on the command line.
    explicit = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), NOT_GIVEN)))
    args.given = {name: parser.option(name) for name, value in vars(explicit).items() if value is not NOT_GIVEN}
    if args.evaluate and (ignored := args.given.keys() - EVALUATE_OPTIONS):
        parser.error(f"--evaluate does not use {args.given[min(ignored)]}")
    if "split" in args.given and not args.evaluate:
        parser.error("--split chooses the stars of --evaluate")
    if args.initial_checkpoint and "recipe" in args.given:
        parser.error("--initial-checkpoint has its own recipe; change single options of it")
    if args.demo and args.resume:
        parser.error("--demo starts a run; --resume goes on with one: --output-dir demo")
    if args.demo and "data_dir" in args.given:
        parser.error("--demo simulates its own stars; go on without --data-dir, or without --demo")
    if args.validation_split + args.test_split >= 1:
        parser.error("--validation-split and --test-split together leave no star to train on")
    args.recipe_name = args.recipe
    args.recipe = recipe_from(args, **(DEMO_RECIPE if args.demo else {}))
    if args.demo:
        for name in DEMO_DEFAULTS.keys() - args.given:
            setattr(args, name, DEMO_DEFAULTS[name])
    return args


def make_parser(docstring: str) -> ScriptParser:
    parser = ScriptParser(docstring)
    add, number = parser.add_argument, number_between
    add("--data-dir", type=Path, default=Path("."), metavar="DIR",
        help="directory with objects.csv, spectra/ and images/")  # fmt: skip
    add("--output-dir", type=Path, default=Path("."), metavar="DIR",
        help="directory for checkpoints/, plots/ and training_history.json")  # fmt: skip
    add("--validation-split", type=number(float, 0.001, 0.999), default=0.2, metavar="FRACTION",
        help="fraction of the stars used for checkpoint selection")  # fmt: skip
    add("--test-split", type=number(float, 0, 0.999), default=0.0, metavar="FRACTION",
        help="fraction of the stars held out for the final test")  # fmt: skip
    add("--seed", dest="random_seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N",
        help="random seed of the split and the training")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it")
    add("--num-workers", type=number(int, 0, 256), default=min(8, os.cpu_count() or 1), metavar="N",
        help="worker processes that decode the stars' files")  # fmt: skip
    add("--patience", type=number(int, 1, 10**6), metavar="N",
        help="early stopping: end after N epochs without a new best validation F1")  # fmt: skip
    add("--initial-checkpoint", type=Path, metavar="CHECKPOINT", help="start from the weights, the standardisation "
        "and the recipe of this checkpoint; classes without stars are allowed")  # fmt: skip
    add("--tensorboard", action="store_true", help="also write the curves to tensorboard/ID in --output-dir")
    add("--resume", metavar="{auto,FILE}", help="resume an unfinished run from checkpoints/last_state_ID.pth; auto: "
        "the newest one with these options in --output-dir, or a new run if there is none")  # fmt: skip
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="score this checkpoint instead of training")
    add("--split", choices=("validation", "test", "all"), default="validation", help="stars that --evaluate "
        "scores; all: every star of --data-dir")  # fmt: skip
    add("--demo", action="store_true", help=f"simulate stars and train on them from random weights; all in {DEMO_DIR}/")
    parser.add_quiet()
    add_recipe_options(parser)
    return parser
