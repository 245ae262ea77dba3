"""The table and the figures of accuracy.py's results."""

import argparse

import numpy as np
import pandas as pd
from classical import median_snr

from catalog import CLASS_NAMES
from cli import write_atomically
from evaluation import Evaluation
from plots import Axes, new_figure

REFERENCE = "paper"  # the row that others are compared with
SNR_LIMITS = (3, 5, 10, 20)
SNR_BINS = ("below 3", "3 to 5", "5 to 10", "10 to 20", "above 20")


def f1_by_snr(evaluation: Evaluation, spectra: np.ndarray) -> list[tuple[int, float]]:
    """Number of stars and their F1 (0 of none) in each of SNR_BINS. spectra: (N, 2, 3522), prepared."""
    bins = np.digitize(median_snr(spectra), SNR_LIMITS)
    results = []
    for k in range(len(SNR_BINS)):
        some = Evaluation(evaluation.targets[bins == k], evaluation.logits[bins == k])
        count = len(some.targets)
        results.append((count, round(some.scores()["f1"], 4) if count else 0.0))
    return results


def summarise(values: pd.DataFrame) -> pd.DataFrame:
    """The mean over the sets and its standard error (NaN of one set), by row.

    values: a column a row, indexed by set, draw and seed; NaN where a run is missing.
    """
    means = values.groupby(level="set").mean()
    return pd.DataFrame({"mean": means.mean(), "error": means.sem()})


def paired_differences(f1: pd.DataFrame, reference: str) -> pd.DataFrame:
    """`summarise` of the F1 of each row minus that of the reference row in the same runs."""
    return summarise(f1.sub(f1[reference], axis=0))


def as_markdown(results: pd.DataFrame) -> str:
    """The table, its best row first, and the gain from checkpoint selection."""
    f1 = results.pivot(index=["set", "draw", "seed"], columns="row", values="f1")
    by_set = f1.groupby(level=["set", "draw"]).mean().groupby(level="set")
    overall = summarise(f1)
    differences = paired_differences(f1, REFERENCE) if REFERENCE in f1 else overall * np.nan

    def show(mean: float, error: float, sign: str = "") -> str:
        return "–" if np.isnan(mean) else f"{mean:{sign}.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}")

    means, errors = by_set.mean(), by_set.sem()
    differences.loc[overall.index == REFERENCE] = np.nan
    lines = ["| row | " + " | ".join([*means.index, "mean over sets", f"less {REFERENCE}"]) + " |"]
    lines.append("|---" * (len(means) + 3) + "|")
    for row in overall["mean"].sort_values(ascending=False).index:
        cells = [show(means.loc[name, row], errors.loc[name, row]) for name in means.index]
        cells += [show(*overall.loc[row]), show(*differences.loc[row], sign="+")]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    if "last_f1" in results:
        gains = results.assign(gain=results["f1"] - results["last_f1"]).set_index(["set", "draw", "seed"])[["gain"]]
        gain = show(*summarise(gains).loc["gain"], sign="+")
        lines += ["", f"F1 of the best checkpoint less that of the last epoch, over all networks: {gain}."]
    return "\n".join(lines) + "\n"


def draw_rows(axes: Axes, results: pd.DataFrame) -> None:
    """The F1 of each run, a point; the bar is the mean over the sets."""
    means = results.groupby(["row", "set"])["f1"].mean().groupby("row").mean().sort_values()
    networks = set(results.dropna(subset="recipe")["row"])
    axes.barh(means.index, means, color=["C0" if row in networks else "0.6" for row in means.index], alpha=0.5)
    for name, runs in results.groupby("set"):
        axes.plot(runs["f1"], runs["row"], "o", markersize=4, label=name)
    axes.set(xlim=(max(0, results["f1"].min() - 0.05), 1), xlabel="weighted F1 on held-out stars (blue: networks)")


def draw_snr(axes: Axes, results: pd.DataFrame) -> None:
    """The networks' F1 by S/N, over the stars of all sets."""
    for row, by_snr in results.dropna(subset="recipe").groupby("row", sort=False)["f1_by_snr"]:
        counts, f1 = np.array(list(by_snr)).transpose(2, 0, 1)  # each (runs, bins)
        mean = (counts * f1).sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
        axes.plot(SNR_BINS, np.where(counts.any(axis=0), mean, np.nan), "o-", label=row)
    axes.set(xlabel="median S/N a pixel", ylabel="weighted F1 on held-out stars")


def report(results: pd.DataFrame, args: argparse.Namespace) -> None:
    """Write and print the table; draw the figures."""
    training, test = (count * len(CLASS_NAMES) for count in args.per_class)
    title = f"{training} SIMULATED stars to train and to select the checkpoint, {test} held out"
    fields = "".join(f", {name}={value}" for name, value in args.fields.items())
    table = f"""{title}; {args.draws} draw(s) of each set, {args.seeds} seed(s){fields}.
Weighted F1 on the held-out stars ± standard error: of a set over its draws, of means and paired differences over sets.

{as_markdown(results)}"""
    with write_atomically(args.directory / "accuracy.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    figures = {"accuracy.png": (draw_rows, (10, 1.5 + 0.35 * results["row"].nunique()))}
    if results["recipe"].notna().any():
        figures["snr.png"] = (draw_snr, (7, 4.5))
    for name, (draw, size) in figures.items():
        with new_figure(args.directory / name, size) as figure:
            axes = figure.subplots()
            draw(axes, results)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
            figure.suptitle(title, fontsize=8)
    print(f"\n{table}\nin {args.directory}: results.jsonl, accuracy.md, {', '.join(figures)}")
