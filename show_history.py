"""Print the runs in training_history.json with the best of each data set marked; plot the curves of some together.

    python show_history.py                                      a table of all runs
    python show_history.py ID ID                                and the curves of these in plots/comparison.png
    python show_history.py --history demo/training_history.json

Compare scores only between runs that were scored on the same stars. Such runs have the same number in the column "set",
and an asterisk marks the best validation F1 of a set with two runs or more. Where the intervals of two runs overlap,
their difference may be chance. Validation scores were used for checkpoint selection: they are optimistic.
"""

import argparse
from pathlib import Path

from cli import ScriptParser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("training_ids", nargs="*", metavar="ID", help="plot the curves of these runs, two or more")
    add("--history", type=Path, default=Path("training_history.json"), metavar="JSON", help="file of the runs")
    add("--output", type=Path, default=Path("plots/comparison.png"), metavar="PNG",
        help="file for the curves; an earlier comparison is replaced, no other file is")  # fmt: skip
    args = parser.parse_args(argv)
    if len(args.training_ids) == 1:
        parser.error("name two runs or more, or none; the curves of one run are in plots/training_plot_ID.png")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before matplotlib is imported: --help and mistakes are answered at once

import json
from collections import ChainMap
from typing import Any

from cli import DataError, refuse_foreign_file, run_as_script
from plots import new_figure

UNKNOWN = "–"
SOFTWARE = Path(__file__).name  # identifies this script's PNG files
# Runs that agree in all of these were scored on the same stars.
SAME_STARS = ("csv_file", "stars", "stars_by_class_and_split", "held_out_stars")
CURVES = ("train_loss", "val_loss", "val_f1")


def main(args: argparse.Namespace) -> None:
    runs = read_runs(args.history)
    if args.training_ids:
        runs = choose_runs(runs, args.training_ids, args.history)
        refuse_foreign_file(args.output, SOFTWARE)
        plot_curves(args.output, runs)
    rows = make_table(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print("\nRuns of one set were scored on the same stars, others do not compare; * best validation F1 of its set.")
    if args.training_ids:
        print(f"Curves: {args.output}")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The entries of each run in one dictionary, from all parts of its record; old records lack some."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; train.py writes it into its --output-dir") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise DataError(f"{path}: damaged, or no JSON file ({error})") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: not a history, which is a list with one record a run")
    if not records:
        raise DataError(f"{path}: no run in it yet")
    runs = []
    for record in records:
        parts = [record.get(part) for part in ("config", "epoch_metrics", "final_metrics")]
        runs.append(dict(ChainMap(record, *(part for part in parts if isinstance(part, dict)))))
    return runs


def choose_runs(runs: list[dict[str, Any]], training_ids: list[str], path: Path) -> list[dict[str, Any]]:
    by_id = {run["training_id"]: run for run in runs if "training_id" in run}
    for training_id in training_ids:
        if training_id not in by_id:
            raise DataError(f"{path}: no run {training_id}; it holds {', '.join(by_id)}")
        if not by_id[training_id].keys() >= set(CURVES):
            raise DataError(f"{path}: run {training_id} has no curves")
    return [by_id[training_id] for training_id in dict.fromkeys(training_ids)]


def scored_on(run: dict[str, Any]) -> str | None:
    """A key, equal for runs that were scored on the same stars; None if the record does not name them."""
    return json.dumps([run[key] for key in SAME_STARS]) if run.keys() >= set(SAME_STARS) else None


def make_table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """The header, and a row for each run."""
    sets = [scored_on(run) for run in runs]
    numbers = {stars: str(k) for k, stars in enumerate(dict.fromkeys(filter(None, sets)), start=1)}
    scores = [run.get("final_val_f1_weighted") or -1.0 for run in runs]
    rows = []
    for run, stars, score in zip(runs, sets, scores, strict=True):
        rivals = [other for own, other in zip(sets, scores, strict=True) if own == stars]
        seconds, epochs, last_epoch = (
            run.get(name) for name in ("total_training_time_seconds", "num_epochs", "last_epoch")
        )
        row = {
            "best": "*" if stars and len(rivals) > 1 and score == max(rivals) else " ",
            "ID": run.get("training_id"),
            "when": run.get("timestamp", "")[:16].replace("T", " "),
            "set": numbers.get(stars),
            "data": run.get("stars"),
            "catalogue": run.get("csv_file"),
            "recipe": run.get("recipe"),
            "reads": run.get("modality"),
            "epochs": epochs if last_epoch in (None, epochs) else f"{last_epoch} of {epochs}",
            "val F1 (95 %)": format_score(run, "val"),
            "test F1 (95 %)": format_score(run, "test"),
            "time": seconds and f"{seconds:.0f} s",
        }
        rows.append([UNKNOWN if cell in (None, "") else str(cell) for cell in row.values()])
    return [list(row), *rows]


def format_score(run: dict[str, Any], part: str) -> str:
    score, intervals = run.get(f"final_{part}_f1_weighted"), run.get(f"final_{part}_intervals_95")
    if score is None:
        return UNKNOWN
    return f"{score:.3f}" + (" ({:.3f} to {:.3f})".format(*intervals["f1"]) if intervals else "")


def plot_curves(path: Path, runs: list[dict[str, Any]]) -> None:
    """Loss and validation F1 by epoch, one colour a run."""
    with new_figure(path, (12, 5.2), software=SOFTWARE) as figure:
        left, right = figure.subplots(1, 2)
        for k, run in enumerate(runs):
            label = ", ".join(str(run.get(key, UNKNOWN)) for key in ("training_id", "recipe", "modality", "stars"))
            for axes, name, style in ((left, "train_loss", ":"), (left, "val_loss", "-"), (right, "val_f1", "o-")):
                epochs = range(1, len(run[name]) + 1)
                axes.plot(epochs, run[name], style, color=f"C{k}", markersize=3, label=label if axes is right else None)
        left.set(xlabel="epoch", ylabel="loss (compares at one batch size only)")
        left.set_title("dotted: training, solid: validation")
        right.set(xlabel="epoch", ylabel="validation F1 (weighted)", ylim=(0, 1.02))
        if len({scored_on(run) for run in runs}) > 1 or scored_on(runs[0]) is None:
            right.set_title("not scored on the same stars: these do not compare")
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center")


if __name__ == "__main__":
    run_as_script(lambda: main(ARGUMENTS))
