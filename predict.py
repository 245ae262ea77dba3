"""Classify the stars of a catalogue, labelled or not, with a checkpoint that train.py wrote.

    python predict.py checkpoints/best_model_ID.pth --data-dir DIR              DIR/objects.csv → predictions.csv
    python predict.py checkpoints/best_model_ID.pth --data-dir DIR --output hyades.csv
    python predict.py checkpoints/best_model_ID.pth --data-dir DIR --least-certain 20

DIR/objects.csv needs the columns name, plate, mjd, fiberID; subclass may be absent, empty or anything. The files
may lie in spectra/ and images/ or in any folder there, under the names that README.md gives. Each star gets a row:

    predicted_subclass, p_M0 … p_M4    the most probable subclass, and the probability of each
    expected_subclass, its _std        mean of the subclass numbers 0…4 weighted by probability, and their deviation
    unlikeness, unlike_training        above 1, True: farther from the training stars than 99.5 % of these are
                                       (outliers.py); whatever it is, its subclass means nothing
    inputs, problem                    what the network read, and what is missing or damaged

A predictions.csv of an earlier run is replaced, any other file of that name is not.
"""

import argparse
import csv
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import outliers
from data import CLASS_NAMES, DataError, Spectrum, Star
from model import FusionModel, load_checkpoint
from train import choose_device

BATCH_SIZE = 64  # stars; no score depends on it
COLUMNS = (
    "name", "plate", "mjd", "fiberID", "catalog_subclass", "simulated", "predicted_subclass",
    *(f"p_{name}" for name in CLASS_NAMES), "expected_subclass", "expected_subclass_std",
    "unlikeness", "unlike_training", "inputs", "problem",
)  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a file that train.py wrote into checkpoints/")
    add("--data-dir", type=Path, default=Path("."), metavar="DIR", help="holds objects.csv, spectra/ and images/")
    add("--output", type=Path, default=Path("predictions.csv"), metavar="CSV", help="gets a row for each star")
    add("--least-certain", type=data.number_between(int, 0, 1000), default=5, metavar="N",
        help="print the command that draws the N stars whose predicted subclass is least probable")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    parser.add_quiet()
    return parser.parse_args(argv)


def choose_inputs(model: FusionModel, there: set[str]) -> tuple[str, ...]:
    """Which of a star's inputs "spectrum" and "image" the network is given; none if it needs one that is not there."""
    possible = {"fusion": [("spectrum", "image")], "spectrum": [("spectrum",)], "image": [("image",)]}[model.modality]
    if model.modality == "fusion" and model.image_dropout > 0:  # it has learned from spectra without image, too
        possible.append(("spectrum",))
    return next((inputs for inputs in possible if there.issuperset(inputs)), ())


class StarFiles(NamedTuple):
    """A star's files as they are and as the network gets them, None where missing or damaged; `problems` say why."""

    star: Star
    observed: Spectrum | None
    pixels: np.ndarray | None  # (height, width, 3) uint8
    prepared: dict[str, Tensor]  # "spectrum": (3522,) float32, "image": (3, 128, 128) uint8
    problems: list[str]


def read_files(data_dir: Path, star: Star, kinds: tuple[str, ...] = ("spectrum", "image")) -> StarFiles:
    """Read a star's files, wherever in spectra/ and images/ they lie, and prepare them as for training."""
    observed = pixels = None
    prepared: dict[str, Tensor] = {}
    problems = {}
    try:
        if path := data.find_spectrum(data_dir, star):
            observed = data.read_spectrum(path, star)  # also unwanted: it tells whether the star is simulated
            star = star._replace(simulated=star.simulated or observed.simulated)
            if "spectrum" in kinds:
                prepared["spectrum"] = torch.from_numpy(data.prepare_spectrum(observed))
        else:
            problems["spectrum"] = "no spectrum"
    except DataError as error:
        problems["spectrum"] = str(error)
    try:
        if "image" in kinds and (path := data.find_cutout(data_dir, star)):
            pixels, simulated = data.read_cutout(path)
            star = star._replace(simulated=star.simulated or simulated)
            prepared["image"] = torch.from_numpy(data.prepare_cutout(pixels))
        else:
            problems["image"] = "no image"
    except DataError as error:
        problems["image"] = str(error)
    return StarFiles(star, observed, pixels, prepared, [problems[kind] for kind in kinds if kind in problems])


@torch.inference_mode()
def class_logits(model: FusionModel, inputs: dict[str, Tensor]) -> Tensor:
    """(B, 5) float64 on the CPU, from "spectrum" (B, 3522) and "image" (B, 3, 128, 128), or one of them."""
    device = model.cls_token.device
    specs, imgs = (inputs[kind].to(device) if kind in inputs else None for kind in ("spectrum", "image"))
    _, fuse_logits = model(specs, imgs)
    return fuse_logits.double().cpu()


def classify(model: FusionModel, references: dict[str, dict[str, Tensor]], files: list[StarFiles]) -> list[dict]:
    """The output's row of each star; `references`: of outliers.py, by input."""
    chosen = [choose_inputs(model, set(entry.prepared)) for entry in files]
    rows = [
        {column: getattr(entry.star, column) for column in ("name", "plate", "mjd", "fiberID", "simulated")}
        | {"catalog_subclass": entry.star.subclass, "inputs": "+".join(kinds), "problem": "; ".join(entry.problems)}
        for entry, kinds in zip(files, chosen, strict=True)
    ]
    for kinds in set(chosen) - {()}:  # the stars of one batch have the same inputs
        members = [i for i, own in enumerate(chosen) if own == kinds]
        inputs = {kind: torch.stack([files[i].prepared[kind] for i in members]) for kind in kinds}
        probabilities = class_logits(model, inputs).softmax(dim=1).numpy()
        subclass = np.arange(len(CLASS_NAMES))
        mean = probabilities @ subclass
        std = np.sqrt((probabilities * (subclass - mean[:, None]) ** 2).sum(axis=1))
        # An odd image makes a star odd, whatever its spectrum, and the reverse: the larger of the two counts.
        unlike = [outliers.unlikeness(kind, inputs[kind], references[kind]) for kind in kinds if kind in references]
        unlikeness = torch.stack(unlike).amax(dim=0).tolist() if unlike else []
        for j, i in enumerate(members):
            by_class = zip(CLASS_NAMES, probabilities[j].tolist(), strict=True)
            rows[i]["predicted_subclass"] = CLASS_NAMES[probabilities[j].argmax()]
            rows[i] |= {f"p_{name}": round(probability, 5) for name, probability in by_class}
            rows[i] |= {"expected_subclass": round(mean[j], 3), "expected_subclass_std": round(std[j], 3)}
            if unlikeness:
                rows[i] |= {"unlikeness": round(unlikeness[j], 3), "unlike_training": unlikeness[j] > 1}
    return rows


def report(rows: list[dict], stars: list[Star], output: Path) -> None:
    """Print how many stars are of which subclass, how many are odd, and which could not be classified and why."""
    classified = [row for row in rows if row["inputs"]]
    print(f"{output}: {data.describe(stars)}, {len(classified)} of them classified")
    by_subclass = Counter(row["predicted_subclass"] for row in classified)
    print("  " + ", ".join(f"{name} {by_subclass[name]}" for name in CLASS_NAMES))
    if odd := [row["name"] for row in classified if row.get("unlike_training")]:
        print(f"  unlike the training stars: {len(odd)} ({', '.join(odd[:5])}{', …' * (len(odd) > 5)})")
    if "unlikeness" not in classified[0]:
        print("  unlikeness is empty: this checkpoint does not know its training stars; train.py writes those that do")
    problems = Counter(row["problem"] for row in rows if not row["inputs"])
    for problem, count in problems.most_common(10):
        print(f"  not classified: {count} ({problem})")
    if len(problems) > 10:
        print(f"  and for {len(problems) - 10} other reasons, in the column problem")


def classify_catalog(args: argparse.Namespace) -> None:
    data.refuse_foreign_file(args.output, ",".join(COLUMNS))
    stars, left_out = data.read_catalog(data.catalog_path(args.data_dir), labelled=False)
    for reason, count in left_out.items():
        print(f"{count} row(s) of the catalogue left out: {reason}")
    model, checkpoint = load_checkpoint(args.checkpoint, choose_device(args.device))
    kinds = choose_inputs(model, {"spectrum", "image"})

    rows, seen = [], []
    with data.progress(total=len(stars), desc="classifying", unit="star") as progress:
        for start in range(0, len(stars), BATCH_SIZE):  # batch by batch: a survey does not fit into memory
            batch = [read_files(args.data_dir, star, kinds) for star in stars[start : start + BATCH_SIZE]]
            rows += classify(model, checkpoint.get("references", {}), batch)
            seen += [entry.star for entry in batch]
            progress.update(len(batch))
    classified = [row for row in rows if row["inputs"]]
    if not classified:
        raise DataError(
            f"{args.data_dir}: none of its {len(rows)} stars can be classified: this network reads "
            f"{' and '.join(kinds)} ({rows[0]['name']}: {rows[0]['problem']})"
        )
    with data.write_atomically(args.output) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)

    report(rows, seen, args.output)
    known = [Star(*row) for part in ("train", "validation") for row in checkpoint["splits"][part]]
    if familiar := data.count_known(stars, known):
        print(f"  note: the network was trained on, or chosen by, {familiar} of them: it knows these too well")
    if args.least_certain:
        uncertain = sorted(classified, key=lambda row: row[f"p_{row['predicted_subclass']}"])[: args.least_certain]
        names = [row["name"] for row in uncertain]
        options = ["--data-dir", str(args.data_dir), "--checkpoint", str(args.checkpoint)]
        print("See the least certain:\n" + shlex.join(["python", "show_star.py", *names, *options]))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with data.quietly(args.quiet):
        classify_catalog(args)


if __name__ == "__main__":
    data.run_as_script(main)
