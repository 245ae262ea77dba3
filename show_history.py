"""Print the runs in training_history.json, the best of each data set marked; draw some of them over each other.

    python show_history.py                                      a table of all runs
    python show_history.py ID ID                                and the curves of these in plots/comparison.png
    python show_history.py --history demo/training_history.json

Scores compare only between runs that were scored on the same stars: from the same catalogue, of as many stars,
split in the same way by the same seed. Such runs carry the same number in the column "set", and the best
validation F1 of a set with two runs or more gets a star. Where the intervals of two runs overlap, chance may have
chosen between them; and the validation stars chose each run's epoch, so that their score flatters (README.md).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import data
from data import DataError

UNKNOWN = "–"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
    add = parser.add_argument
    add("training_ids", nargs="*", metavar="ID", help="two runs or more, whose curves are drawn")
    add("--history", type=Path, default=Path("training_history.json"), metavar="JSON", help="the file of runs")
    add("--output", type=Path, default=Path("plots/comparison.png"), metavar="PNG",
        help="gets the curves; an earlier comparison is replaced, no other file is")  # fmt: skip
    args = parser.parse_args(argv)
    if len(args.training_ids) == 1:
        parser.error("name two runs or more, or none; the curves of one run are in plots/training_plot_ID.png")
    return args


def read_runs(path: Path) -> list[dict]:
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; train.py writes it into its --output-dir") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise DataError(f"{path}: damaged, or no JSON file ({error})") from error
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise DataError(f"{path}: not a history, which is a list with one record a run")
    if not runs:
        raise DataError(f"{path}: no run in it yet")
    return runs


def look_up(run: dict, *keys: str, kind: type | tuple[type, ...] = object) -> Any:
    """What stands in a run under these keys; None where an old or foreign record has nothing of that kind there."""
    value: Any = run
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def number(run: dict, *keys: str) -> float | None:
    return look_up(run, *keys, kind=(int, float))


def scored_on(run: dict) -> str | None:
    """What two runs must share to have been scored on the same stars; None where the record does not tell."""
    keys = ("csv_file", "stars", "validation_split", "test_split", "random_seed", "stars_by_class_and_split")
    values = [look_up(run, "config", key) for key in keys]
    # Earlier records do not name the stars; theirs compare with each other.
    return None if None in values else json.dumps([*values, look_up(run, "config", "held_out_stars", kind=str)])


def make_table(runs: list[dict]) -> pd.DataFrame:
    """A row for each run, as text."""
    sets = [scored_on(run) for run in runs]
    numbers = {stars: str(k) for k, stars in enumerate(dict.fromkeys(filter(None, sets)), start=1)}
    scores = [number(run, "final_metrics", "final_val_f1_weighted") for run in runs]
    rows = []
    for run, stars, score in zip(runs, sets, scores, strict=True):
        rivals = [other for own, other in zip(sets, scores, strict=True) if own == stars and other is not None]
        best = stars is not None and len(rivals) > 1 and score == max(rivals)
        seconds = number(run, "total_training_time_seconds")
        row = {
            "best": "*" if best else " ",
            "ID": look_up(run, "config", "training_id", kind=str),
            "when": (look_up(run, "config", "timestamp", kind=str) or "")[:16].replace("T", " "),
            "set": numbers.get(stars),
            "data": look_up(run, "config", "stars", kind=str),
            "catalogue": look_up(run, "config", "csv_file", kind=str),
            "reads": look_up(run, "config", "modality", kind=str),
            "epochs": number(run, "config", "num_epochs"),
            "val F1 (95 %)": format_score(run, "val"),
            "test F1 (95 %)": format_score(run, "test"),
            "time": None if seconds is None else f"{seconds:.0f} s",
        }
        rows.append({column: UNKNOWN if cell in (None, "") else str(cell) for column, cell in row.items()})
    return pd.DataFrame(rows)


def format_score(run: dict, part: str) -> str:
    score = number(run, "final_metrics", f"final_{part}_f1_weighted")
    interval = look_up(run, "final_metrics", f"final_{part}_intervals_95", "f1", kind=list) or []
    if score is None:
        return UNKNOWN
    if len(interval) != 2 or not all(isinstance(end, int | float) for end in interval):
        return f"{score:.3f}"
    return f"{score:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def choose_runs(runs: list[dict], training_ids: list[str], path: Path) -> list[dict]:
    by_id = {look_up(run, "config", "training_id", kind=str): run for run in runs}
    for training_id in training_ids:
        if training_id not in by_id:
            raise DataError(f"{path}: no run {training_id}; it holds {', '.join(filter(None, by_id))}")
        if not any(curve(by_id[training_id], name) for name in ("val_loss", "val_f1")):
            raise DataError(f"{path}: run {training_id} has no curves")
    return [by_id[training_id] for training_id in dict.fromkeys(training_ids)]


def curve(run: dict, name: str) -> list[float]:
    values = look_up(run, "epoch_metrics", name, kind=list) or []
    return values if all(isinstance(value, int | float) for value in values) else []


def plot_curves(path: Path, runs: list[dict]) -> None:
    """Loss and validation F1 by epoch, one colour a run."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, run in enumerate(runs):
        config = {name: look_up(run, "config", name) or UNKNOWN for name in ("training_id", "modality", "stars")}
        for axes, name, style, label in (
            (left, "train_loss", ":", None),
            (left, "val_loss", "-", None),
            (right, "val_f1", "o-", "{training_id}: {modality}, {stars}".format(**config)),
        ):
            values = curve(run, name)
            axes.plot(range(1, len(values) + 1), values, style, color=f"C{k}", markersize=3, label=label)
    left.set(xlabel="epoch", ylabel="loss (compares at one batch size only)")
    left.set_title("dotted: training (augmented stars), full: validation")
    right.set(xlabel="epoch", ylabel="validation F1 (weighted)", ylim=(0, 1.02))
    if len({scored_on(run) for run in runs}) > 1 or scored_on(runs[0]) is None:
        right.set_title("not scored on the same stars: these do not compare")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    with data.write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": Path(__file__).name})


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    runs = read_runs(args.history)
    if args.training_ids:
        chosen = choose_runs(runs, args.training_ids, args.history)
        data.refuse_foreign_file(args.output, Path(__file__).name)
        plot_curves(args.output, chosen)
        runs = chosen
    print(make_table(runs).to_string(index=False, justify="left"))
    print("\nRuns of one set were scored on the same stars, others do not compare; * best validation F1 of its set.")
    if args.training_ids:
        print(f"Curves: {args.output}")


if __name__ == "__main__":
    data.run_as_script(main)
