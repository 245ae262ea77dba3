"""Classify the stars of a catalogue, labelled or not, with a checkpoint that train.py wrote.

    python predict.py checkpoints/best_model_ID.pth --data-dir DIR              DIR/objects.csv: predictions.csv
    python predict.py checkpoints/best_model_ID.pth --data-dir DIR --output hyades.csv
    torchrun --nproc-per-node=4 predict.py checkpoints/best_model_ID.pth        on four GPUs

DIR/objects.csv needs the columns name, plate, mjd, fiberID; subclass may be absent, empty or anything. The stars' files
are found by their names wherever they lie below spectra/ and images/. Each star gets a row:

    predicted_subclass, p_M0 ... p_M4    the most probable subclass, and the probability of each
    expected_subclass, its _std          mean of the subclass numbers 0 to 4 weighted by probability, and deviation
    outlier_score, is_outlier            above 1, True: farther from the training stars than 99.5 % of these are
                                         (outliers.py); its subclass should not be trusted
    problem                              why it cannot be classified

After an interruption the same command goes on where it was. An earlier output of this script is replaced, any other
file of that name is not.
"""

import argparse
import os
from pathlib import Path

from cli import ScriptParser, number_between


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a file that train.py wrote into checkpoints/")
    add("--data-dir", type=Path, default=Path("."), metavar="DIR", help="holds objects.csv, spectra/ and images/")
    add("--output", type=Path, default=Path("predictions.csv"), metavar="CSV", help="gets a row for each star")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add("--num-workers", type=number_between(int, 0, 256), default=min(8, os.cpu_count() or 1),
        help="processes that decode the stars' files")  # fmt: skip
    parser.add_quiet()
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before torch is imported: --help and mistakes are answered at once

import contextlib
import csv
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from filelock import Timeout

import distributed
from cache import FEW_STARS, INPUTS, Paths, file_stamp, fingerprint
from catalog import CLASS_NAMES, Star, count_known, describe, read_catalog
from checkpoint import load_checkpoint
from classifier import Classifier
from cli import DataError, file_lock, progress, quietly, refuse_foreign_file, run_as_script, write_atomically
from dataset import prefetch
from device import choose_device, out_of_memory_hint
from outliers import References
from prediction import COLUMNS, StarInputs, classify, read_star
from star_files import FileIndex, catalog_path
from workers import parallel_map

CHUNK = 512  # stars that are classified together, and written together


def main(args: argparse.Namespace) -> None:
    with (
        distributed.process_group(),
        quietly(args.quiet or distributed.rank() > 0),
        out_of_memory_hint("try --device cpu"),
    ):
        predict(args)


def predict(args: argparse.Namespace) -> None:
    """Classify the catalogue's stars; of several processes each has chunks of its own, and the first writes the
    table."""
    refuse_foreign_file(args.output, ",".join(COLUMNS))
    stars, left_out = read_catalog(catalog_path(args.data_dir), labelled=False)
    for reason, count in left_out.items():
        print(f"{count} row(s) of the catalogue left out: {reason}")
    classifier, checkpoint = load_checkpoint(args.checkpoint, choose_device(args.device))
    index, kinds = FileIndex(args.data_dir), INPUTS[classifier.recipe.modality]
    files = {star: index.files(star) for star in stars}
    if not any(all(paths[kind] for kind in kinds) for paths in files.values()):
        raise DataError(
            f"{args.data_dir}: none of its {len(stars)} stars has the files that this network reads, of "
            f"{' and '.join(kinds)}; python download_sdss_data.py --data-dir {args.data_dir} fetches them"
        )
    with claim_folder(args.output) as folder:
        parts, missing = plan_parts(folder, files, args.checkpoint)
        if len(missing) < len(parts):
            print(f"{folder}: {len(parts) - len(missing)} of {len(parts)} parts of an interrupted run are kept")
        chunks = {part: stars[k * CHUNK : (k + 1) * CHUNK] for k, part in enumerate(parts)}
        own = {part: chunks[part] for part in missing[distributed.rank() :: distributed.world_size()]}
        classify_chunks(own, files, classifier, checkpoint["references"], args.num_workers)
        if distributed.rank() > 0:
            return
        while not all(part.exists() for part in parts):  # other processes are still at work
            time.sleep(0.5)
        join(parts, args.output)
    report(args.output, stars)
    known = [Star(*row) for part in ("train", "validation") for row in checkpoint["splits"][part]]
    if familiar := count_known(stars, known):
        print(f"  note: {familiar} of them were used for training or checkpoint selection: optimistic")


# The parts of the table: a file for each chunk of stars. So memory stays flat, several processes can work on one table,
# and an interrupted run can go on.


@contextlib.contextmanager
def claim_folder(output: Path) -> Iterator[Path]:
    """Yield the hidden folder of the table's parts, which is deleted when the block succeeds.

    Raises OSError where nothing can be written, DataError where another run is writing the same table.
    """
    folder = output.with_name(f".{output.name}.partial")
    if distributed.rank() > 0:
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(folder / "lock", timeout=0):
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        raise DataError(f"{output}: another predict.py is writing it") from None


def plan_parts(folder: Path, files: dict[Star, Paths], checkpoint: Path) -> tuple[list[Path], list[Path]]:
    """The paths of all parts, and those that are not there yet; as the first process sees it.

    Parts of an interrupted run are there if it had the same checkpoint, stars and files.
    """
    plan = None
    if distributed.rank() == 0:
        run = fingerprint(files), list(files), file_stamp(checkpoint)
        own_folder = folder / hashlib.sha256(repr(run).encode()).hexdigest()
        parts = [own_folder / f"{start}.csv" for start in range(0, len(files), CHUNK)]
        plan = parts, [part for part in parts if not part.exists()]
    return distributed.gather_objects(plan)[0]


def classify_chunks(
    chunks: dict[Path, list[Star]],
    files: dict[Star, Paths],
    classifier: Classifier,
    references: References,
    num_workers: int,
) -> None:
    """Write each chunk of stars to its part. While the device works on one, worker processes decode the next."""
    kinds, total = INPUTS[classifier.recipe.modality], sum(map(len, chunks.values()))
    with (
        parallel_map(num_workers if total > FEW_STARS else 1) as map_stars,
        progress(desc="classifying", unit="star", total=total) as bar,
    ):

        def read(chunk: list[Star]) -> list[StarInputs]:
            return list(map_stars(partial(read_star, kinds), chunk, [files[star] for star in chunk]))

        for part, inputs in zip(chunks, prefetch(read, chunks.values()), strict=True):
            rows = classify(classifier, references, inputs)
            with write_atomically(part) as temporary, open_table(temporary, "w") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
            bar.update(len(inputs))


def open_table(path: Path, mode: str) -> Any:
    # A path that is not UTF-8 has lone surrogates.
    return open(path, mode, newline="", encoding="utf-8", errors="backslashreplace")


def join(parts: list[Path], output: Path) -> None:
    with write_atomically(output) as temporary, open(temporary, "wb") as table:
        table.write(f"{','.join(COLUMNS)}\n".encode())
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, table)


def report(output: Path, stars: list[Star]) -> None:
    """Print how many stars are of which subclass, how many are outliers, and which have no prediction and why."""
    seen, outliers = [], []
    subclasses: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    with open_table(output, "r") as file:
        for star, row in zip(stars, csv.DictReader(file), strict=True):
            seen.append(star._replace(simulated=row["simulated"] == "True"))
            subclasses[row["predicted_subclass"]] += 1
            problems[row["problem"]] += 1
            if row["is_outlier"] == "True":
                outliers.append(star.name)
    print(f"{output}: {describe(seen)}, {problems.pop('', 0)} of them classified")
    print("  " + ", ".join(f"{name} {subclasses[name]}" for name in CLASS_NAMES))
    if outliers:
        print(f"  outliers: {len(outliers)} ({', '.join(outliers[:5])}{', ...' * (len(outliers) > 5)})")
    for problem, count in problems.most_common(10):
        print(f"  not classified: {count} ({problem})")
    if len(problems) > 10:
        print(f"  and for {len(problems) - 10} other reasons, in the column problem")


if __name__ == "__main__":
    run_as_script(lambda: main(ARGUMENTS))
