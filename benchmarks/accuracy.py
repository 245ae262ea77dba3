"""Compare the recipes and the classical methods on the same held-out stars, over several sets of stars.

    python benchmarks/accuracy.py DIR --templates-dir TEMPLATES --workers 8    the whole protocol, for a GPU
    python benchmarks/accuracy.py DIR --rows classical --draws 1 --seeds 1     minutes on two cores
    python benchmarks/accuracy.py DIR --ablate improved                        its differences from paper, one by one
    python benchmarks/accuracy.py DIR --set modality=spectrum num_layers=2     fields of every network's recipe
    python benchmarks/accuracy.py DIR --pretrained CHECKPOINT                  and a network that starts from it

A set is a training directory of 400 stars (320 to train, 80 for checkpoint selection) and a test directory of 1000
held-out stars; it is made in DIR/stars if it is not there. A run is one row on one draw of a set, with one seed of
split and training. Its result is added to DIR/results.jsonl as it ends, and the same command again does only the runs
that are missing. Results of a recipe that has changed since are ignored; after other changes, of the code or of a
checkpoint, use a new DIR.

DIR/accuracy.md and accuracy.png have the weighted F1 by row and set, snr.png that of the networks by S/N. Differences
between rows are paired: taken run by run and averaged within a set; their standard error is over the sets.

The sets `kesseli` and `bochanski` are skipped without --templates-dir, which holds the files of mean spectra
sdss_m_templates.npz and bochanski_m_templates.npz, as template_stars.py describes them.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import classical
from accuracy_report import f1_by_snr, report
from template_stars import simulate_from_templates
from training_run import train_best, training_options

import train
from cache import INPUTS, PreparedStars, read_stars
from catalog import CLASS_NAMES
from checkpoint import load_checkpoint
from cli import DataError, ScriptParser, number_between, quietly, run_as_script
from dataset import StarLoader, random_stream, split_stars
from device import describe_device
from evaluation import Evaluation, evaluate
from recipe import IMPROVED, PAPER, RECIPES, Recipe, add_recipe_options, option_name
from simulate_sdss_data import simulate

# Sets by name: the median S/N a pixel, log-uniform between two values; None: as bright as the catalogue's stars.
SETS = {"simulated": (5, 60), "catalogue": None, "kesseli": (5, 60), "bochanski": (5, 60)}
NETWORKS = {
    "paper": PAPER,
    "improved": IMPROVED,
    "improved, spectra only": replace(IMPROVED, modality="spectrum"),
    "improved, images only": replace(IMPROVED, modality="image"),
    "improved, without SIC": replace(IMPROVED, sic_weight=0.0),
}
# Fields that a network of one input does not use: rows that differ in these alone are one row.
UNUSED = {
    "fusion": (),
    "spectrum": ("sic_weight", "image_backbone", "image_weights", "rotate_and_flip"),
    "image": ("sic_weight", "smoothing", "continuum_degree"),
}
PRETRAINED = "pre-trained"
VALIDATION_SPLIT = 0.2

IDENTITY = ("row", "recipe", "pretrained", "set", "draw", "seed", "per_class")
Run = dict[str, Any]  # the keys of IDENTITY (recipe: None for a classical method) and, once it is done, its result


# Rows and runs


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add, count = parser.add_argument, number_between(int, 1, 10_000)
    add("directory", type=Path, metavar="DIR", help="directory for the stars, the results, the table and the figures")
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="sets of stars to run")
    add("--draws", type=count, default=2, metavar="N", help="draws of each set: other stars of the same kind")
    add("--seeds", type=count, default=2, metavar="N", help="seeds of split and training, for each draw")
    add("--rows", nargs="+", metavar="ROW", default=["networks", "classical"], help="networks, classical, or names")
    add("--ablate", choices=RECIPES.keys() - {"paper"}, help='adds the rows "RECIPE without FIELD" and '
        '"paper with FIELD" for each field in which it differs from paper')  # fmt: skip
    add("--pretrained", type=Path, metavar="CHECKPOINT", help='adds the row "pre-trained": paper, with the network, '
        "its weights and the preparation of spectra from the checkpoint")  # fmt: skip
    add("--set", nargs="+", metavar="FIELD=VALUE", default=[], dest="fields", help="override fields of all recipes")
    add("--templates-dir", type=Path, metavar="TEMPLATES", help="directory with the published mean spectra")
    add("--per-class", type=count, nargs=2, metavar=("TRAIN", "TEST"), default=[80, 200], help="stars of each class")
    add("--workers", type=count, default=2, metavar="N", help="runs in parallel")
    args = parser.parse_args(argv)
    args.fields = parse_fields(args.fields)
    return args


def parse_fields(texts: list[str]) -> dict[str, Any]:
    """Fields of Recipe from FIELD=VALUE, checked as train.py checks its options."""
    parser = argparse.ArgumentParser(usage="--set FIELD=VALUE ...", add_help=False, allow_abbrev=False)
    add_recipe_options(parser)
    parts = (text.partition("=") for text in texts)
    values = vars(parser.parse_args([f"{option_name(field)}={value}" for field, _, value in parts]))
    del values["recipe"]
    return values


def ablations(name: str) -> dict[str, Recipe]:
    """The recipe without each of its differences from PAPER, and PAPER with each."""
    recipe, without, with_one = RECIPES[name], {}, {}
    for field in (field.name for field in fields(Recipe)):
        value, paper_value = getattr(recipe, field), getattr(PAPER, field)
        if value != paper_value:
            without[f"{name} without {field}"] = replace(recipe, **{field: paper_value})
            with_one[f"paper with {field}"] = replace(PAPER, **{field: value})
    return without | with_one


def choose_rows(args: argparse.Namespace) -> dict[str, Recipe | None]:
    """The rows by name; None for a classical method. Of networks that --set makes the same, the first stays."""
    networks: dict[str, Recipe] = {}
    for name, recipe in (NETWORKS | (ablations(args.ablate) if args.ablate else {})).items():
        recipe = replace(recipe, **args.fields)
        recipe = replace(recipe, **{field: getattr(PAPER, field) for field in UNUSED[recipe.modality]})
        if recipe not in networks.values():
            networks[name] = recipe
    if args.pretrained:
        recipe = load_checkpoint(args.pretrained)[0].recipe
        fixed = {field: getattr(recipe, field) for field in train.FIXED_BY_CHECKPOINT}
        networks[PRETRAINED] = replace(PAPER, **args.fields | fixed)
    others = dict.fromkeys(classical.methods(0, args.templates_dir))
    groups = {"networks": networks, "classical": others}
    names = [name for given in args.rows for name in groups.get(given, [given])]
    if unknown := set(names) - {*networks, *others}:
        raise DataError(f"--rows: no row {min(unknown)!r}; there are: {'; '.join([*groups, *networks, *others])}")
    return {name: (networks | others)[name] for name in names}


def star_directories(run: Run, directory: Path) -> list[Path]:
    """The directories of the stars to train on, and of those to score on."""
    parts = zip(("train", "test"), run["per_class"], strict=True)
    return [directory / "stars" / f"{run['set']}-{run['draw']}-{part}-{count}" for part, count in parts]


def make_stars(run: Run, args: argparse.Namespace) -> None:
    """Make the run's stars and decode their files, unless that is done."""
    name, make = run["set"], simulate
    if name in classical.TEMPLATES:
        make = partial(simulate_from_templates, templates_path=classical.template_files(args.templates_dir)[name])
    low, high = SETS[name] or (None, None)
    for part, path in enumerate(star_directories(run, args.directory)):
        if not path.exists():
            seed = random_stream(list(SETS).index(name), run["draw"], part)
            make(path, per_class=run["per_class"][part], seed=seed, min_snr=low, max_snr=high, num_workers=args.workers)
        with quietly():
            read_stars(path, "fusion", args.workers)


def perform(run: Run, directory: Path, templates_dir: Path | None) -> Run:
    """The run with its result."""
    started = time.perf_counter()
    paths = star_directories(run, directory)
    with quietly():
        training, test = (read_stars(path, "fusion", num_workers=1)[0] for path in paths)
        if run["recipe"]:
            evaluation, others = train_network(run, training, test)
        else:
            rows = split_stars(training, VALIDATION_SPLIT, 0.0, run["seed"])["train"]
            training_stars, test_stars = map(classical.observed_stars, paths)
            method = classical.methods(run["seed"], templates_dir)[run["row"]]
            predictions = method.classify(training_stars[rows], test_stars)
            evaluation = Evaluation(test_stars.targets, np.eye(len(CLASS_NAMES))[predictions])
            others = {"device": "cpu"}
    scores = {name: round(value, 4) for name, value in evaluation.scores().items()}
    seconds = round(time.perf_counter() - started, 1)
    return run | scores | {"f1_by_snr": f1_by_snr(evaluation, test.spectra[:].numpy())} | others | {"seconds": seconds}


def train_network(run: Run, training: PreparedStars, test: PreparedStars) -> tuple[Evaluation, dict[str, Any]]:
    """Train as train.py does. Returns the evaluation of the best checkpoint, and further entries of the result."""
    recipe, seed = Recipe(**run["recipe"]), run["seed"]
    options = training_options("--seed", str(seed))
    options.recipe, options.validation_split = recipe, VALIDATION_SPLIT
    unread = dict.fromkeys({"spectra", "images"} - set(INPUTS[recipe.modality]))
    training, test = training._replace(**unread), test._replace(**unread)
    weights = load_checkpoint(Path(run["pretrained"]))[0].state_dict() if run["pretrained"] else None
    classifier, trainer, record = train_best(options, training, weights)
    test_loader = StarLoader(test, np.arange(len(test.stars)), trainer.device)
    best = evaluate(classifier, test_loader)
    last = evaluate(trainer.classifier, test_loader)
    return best, {
        "last_f1": round(last.scores()["f1"], 4),
        "best_epoch": record["final_metrics"]["best_epoch"],
        "validation_f1": round(max(record["epoch_metrics"]["val_f1"]), 4),
        "device": describe_device(trainer.device),
        "git_commit": record["config"]["git_commit"],
    }


# Results


def key(run: Run) -> str:
    """The identity of a run, without its result."""
    return json.dumps([run[name] for name in IDENTITY], sort_keys=True)


def read_results(path: Path) -> dict[str, Run]:
    """The results in a file, by their keys."""
    results = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            result = json.loads(line)
            results[key(result)] = result
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a result ({error}); delete the line") from error
    return results


def perform_all(runs: list[Run], args: argparse.Namespace, path: Path) -> None:
    """Do the runs, several at once, and add each result to the file as it comes."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.workers)))  # of each process
    # Processes that are spawned, not forked, can use the GPU.
    pool = ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(perform, run, args.directory, args.templates_dir) for run in runs]
        for number, future in enumerate(as_completed(futures), 1):
            result = future.result()
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
            name = "{row}, {set}, draw {draw}, seed {seed}: F1 {f1:.3f}, {seconds:.0f} s".format(**result)
            print(f"{number}/{len(runs)}  {name}", flush=True)
    except BrokenExecutor as error:
        raise DataError("a process was killed, perhaps for its memory: lower --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> None:
    args = parse_arguments()
    rows, sets = choose_rows(args), list(args.sets)
    for name in set(sets) & (classical.TEMPLATES.keys() - classical.template_files(args.templates_dir)):
        print(f"the set {name} is skipped: no {classical.TEMPLATES[name]} in --templates-dir")
        sets.remove(name)
    runs = [
        {"row": row, "recipe": recipe and asdict(recipe), "set": name, "draw": draw, "seed": seed,
         "pretrained": str(args.pretrained) if row == PRETRAINED else "", "per_class": args.per_class}
        for name in sets
        for draw in range(args.draws)
        for seed in range(args.seeds)
        for row, recipe in rows.items()
    ]  # fmt: skip
    path = args.directory / "results.jsonl"
    done = read_results(path)
    missing = [run for run in runs if key(run) not in done]
    print(f"{len(runs)} runs, {len(missing)} of them to do", flush=True)
    for run in {(run["set"], run["draw"]): run for run in missing}.values():
        make_stars(run, args)
    perform_all(missing, args, path)
    done = read_results(path)
    report(pd.DataFrame([done[key(run)] for run in runs]), args)


if __name__ == "__main__":
    run_as_script(main)
