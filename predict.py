"""Classify spectra, or the stars of a catalogue, labelled or not, with a checkpoint that train.py wrote.

    python predict.py checkpoints/best_model_ID.pth spec-*.fits                 FITS files of SDSS or LAMOST
    python predict.py checkpoints/best_model_ID.pth --data-dir DIR              the stars of DIR/objects.csv
    python predict.py checkpoints/best_model_ID.pth --data-dir DIR --output hyades.vot
    torchrun --nproc-per-node=4 predict.py checkpoints/best_model_ID.pth        on four GPUs

FILEs need no catalogue; a network of both inputs classifies them without images. DIR/objects.csv needs the columns
name, plate, mjd, fiberID, or the column file; subclass is optional. Its stars' files are found by their names anywhere
below spectra/ and images/. The table has a row for each star:

    name, plate, mjd, fiberID            from the catalogue or the file's name
    ra, dec, simulated                   from the catalogue or the spectrum
    catalog_subclass                     the catalogue's label; where it has none, the survey's class in the spectrum's
                                         header or table
    predicted_subclass, p_M0 ... p_M4    the most probable subclass, and the calibrated probability of each
    spectral_type                        "M2.5 +/- 0.4": mean and standard deviation of the subclass over the
                                         probabilities, the latter at least 0.1; as it is, and with more digits, in
                                         expected_subclass and expected_subclass_std
    TiO5, CaH2, CaH3                     band indices, each with its error, _err, from the spectrum's noise
    zeta, metallicity_class              dM, sdM, esdM or usdM (indices.py)
    EW_Halpha, is_active                 equivalent width in Angstrom, positive in emission
    outlier_score, is_outlier            a star above 1 is an outlier, farther from the training stars than 99.5 % of
                                         them are (outliers.py): do not trust its subclass
    problem                              why it cannot be classified

The ending of --output sets its format: .csv, .ecsv, .fits or .vot (VOTable); all but CSV have units and descriptions.
In .fits and .vot, yes is 1 and no is 0: astropy writes no empty logical cells there.
After an interruption, the same command resumes. An earlier output of this script is replaced, any other file of that
name is not.
"""

import argparse
import os
from pathlib import Path

from cli import ScriptParser, number_between
from tables import table_path


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a file that train.py wrote into checkpoints/")
    add("files", nargs="*", type=Path, default=[], metavar="FILE", help="a spectrum, may be gzipped")
    add("--data-dir", type=Path, metavar="DIR",
        help="instead of FILEs: directory with objects.csv, spectra/ and images/ (default: .)")  # fmt: skip
    add("--output", type=table_path, default=Path("predictions.csv"), metavar="TABLE", help="file for the table")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add("--num-workers", type=number_between(int, 0, 256), default=min(8, os.cpu_count() or 1),
        metavar="N", help="worker processes that decode the stars' files")  # fmt: skip
    parser.add_quiet()
    args = parser.parse_intermixed_args(argv)  # FILEs may stand behind options
    if args.files and args.data_dir:
        parser.error("FILEs or --data-dir: one of them")
    args.data_dir = args.data_dir or Path(".")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before torch is imported: --help and mistakes are answered at once

import contextlib
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

from filelock import Timeout

import distributed
from cache import FEW_STARS, INPUTS, StarFiles, file_stamp, files_digest
from catalog import CLASS_NAMES, Star, check_places, describe, read_catalog, report_left_out
from checkpoint import describe_training, load_checkpoint, note_known_stars
from classifier import Classifier
from cli import DataError, file_lock, progress, quietly, run_as_script
from dataset import prefetch
from device import choose_device, out_of_memory_hint
from outliers import References
from prediction import StarInputs, classify, inputs_without_images, read_star, star_of_file
from star_files import FileIndex, catalog_path
from tables import read_parts, refuse_foreign_table, write_part, write_table
from workers import parallel_map

STARS_PER_PART = 512  # stars that are classified together, and written together


def main(args: argparse.Namespace) -> None:
    with (
        distributed.process_group(),
        quietly(args.quiet or distributed.rank() > 0),
        out_of_memory_hint("try --device cpu"),
    ):
        predict(args)


def predict(args: argparse.Namespace) -> None:
    """Classify the stars. With several processes, each has chunks of its own, and the first writes the table."""
    refuse_foreign_table(args.output)
    for path in args.files:
        if not path.is_file():
            raise DataError(f"{path}: {'a directory; name its files' if path.is_dir() else 'no such file'}")
    files = dict(map(star_of_file, args.files)) or find_stars(args.data_dir)
    stars = list(files)
    classifier, checkpoint = load_checkpoint(args.checkpoint, choose_device(args.device))
    print(f"{args.checkpoint}: trained on {describe_training(checkpoint)}")
    kinds = inputs_without_images(classifier) if args.files else INPUTS[classifier.recipe.modality]
    if not any(all(paths[kind] for kind in kinds) for paths in files.values()):
        raise DataError(
            f"{args.data_dir}: none of its {len(stars)} stars has {' and '.join(kinds)}, which this network reads; "
            f"python download_sdss_data.py --data-dir {args.data_dir} fetches them"
            + "; python predict.py CHECKPOINT FILE... needs no images"
            * (kinds == INPUTS["fusion"])
        )
    with claim_folder(args.output) as folder:
        parts, missing = plan_parts(folder, files, args.checkpoint)
        if len(missing) < len(parts):
            print(f"{folder}: {len(parts) - len(missing)} of {len(parts)} parts of an interrupted run are kept")
        chunks = {part: stars[k * STARS_PER_PART : (k + 1) * STARS_PER_PART] for k, part in enumerate(parts)}
        own = {part: chunks[part] for part in missing[distributed.rank() :: distributed.world_size()]}
        classify_chunks(own, files, kinds, classifier, checkpoint["references"], args.num_workers)
        if distributed.rank() > 0:
            return
        while not all(part.exists() for part in parts):  # other processes are still at work
            time.sleep(0.5)
        stars = [complete(star, row) for star, row in zip(stars, read_parts(parts), strict=True)]
        if not args.files:
            check_places(catalog_path(args.data_dir), [(star.spectrum_id, star) for star in stars])
        write_table(args.output, parts)
        classified = report(args.output, stars, read_parts(parts))
    if not classified:
        raise DataError(f"{args.output}: none of its stars could be classified; its column problem says why")
    note_known_stars(stars, args.checkpoint, checkpoint)


def find_stars(data_dir: Path) -> dict[Star, StarFiles]:
    """The stars of the catalogue, and their files."""
    stars, left_out = read_catalog(catalog_path(data_dir), labelled=False)
    report_left_out(left_out)
    index = FileIndex(data_dir)
    return {star: index.files(star) for star in stars}


def complete(star: Star, row: dict[str, str]) -> Star:
    """The star, with `simulated` and the position as found in its files."""
    return star._replace(
        simulated=row["simulated"] == "True", ra=float(row["ra"] or "nan"), dec=float(row["dec"] or "nan")
    )


# The table is written in parts, a file for each chunk of stars: memory stays flat, several processes can work on one
# table, and an interrupted run can resume.


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


def plan_parts(folder: Path, files: dict[Star, StarFiles], checkpoint: Path) -> tuple[list[Path], list[Path]]:
    """The paths of all parts, and of those still missing, as the first process sees them.

    Parts of an interrupted run are kept if it had the same checkpoint, stars and files.
    """
    plan = None
    if distributed.rank() == 0:
        run = files_digest(files), list(files), file_stamp(checkpoint)
        own_folder = folder / hashlib.sha256(repr(run).encode()).hexdigest()
        parts = [own_folder / f"{start}.csv" for start in range(0, len(files), STARS_PER_PART)]
        plan = parts, [part for part in parts if not part.exists()]
    return distributed.gather_objects(plan)[0]


def classify_chunks(
    chunks: dict[Path, list[Star]],
    files: dict[Star, StarFiles],
    kinds: tuple[str, ...],
    classifier: Classifier,
    references: References,
    num_workers: int,
) -> None:
    """Write each chunk of stars to its part. While the device works on one, worker processes decode the next."""
    total = sum(map(len, chunks.values()))
    with (
        parallel_map(num_workers if total > FEW_STARS else 1) as map_stars,
        progress(desc="classifying", unit="star", total=total) as bar,
    ):

        def read(chunk: list[Star]) -> list[StarInputs]:
            return list(map_stars(partial(read_star, kinds), chunk, [files[star] for star in chunk]))

        for part, inputs in zip(chunks, prefetch(read, chunks.values()), strict=True):
            write_part(part, classify(classifier, references, inputs))
            bar.update(len(inputs))


def report(output: Path, stars: list[Star], rows: Iterable[dict[str, str]]) -> int:
    """Print the number of stars by subclass, of active and metal-poor ones, the outliers, and the stars not classified
    by reason.

    Returns the number of classified stars.
    """
    outliers: list[str] = []
    subclasses: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    for star, row in zip(stars, rows, strict=True):
        subclasses[row["predicted_subclass"]] += 1
        kinds["active"] += row["is_active"] == "True"
        kinds[row["metallicity_class"]] += 1
        problems[row["problem"]] += 1
        if row["is_outlier"] == "True":
            outliers.append(star.name)
    classified = problems.pop("", 0)
    print(f"{output}: {describe(stars)}, {classified} of them classified")
    print("  " + ", ".join(f"{name} {subclasses[name]}" for name in CLASS_NAMES))
    print("  " + ", ".join(f"{kind}: {count}" for kind, count in kinds.items() if kind not in ("", "dM")))
    if outliers:
        print(f"  outliers: {len(outliers)} ({', '.join(outliers[:5])}{', ...' * (len(outliers) > 5)})")
    for problem, count in problems.most_common(10):
        print(f"  not classified: {count} ({problem})")
    if len(problems) > 10:
        print(f"  and for {len(problems) - 10} other reasons, in the column problem")
    return classified


if __name__ == "__main__":
    run_as_script(lambda: main(ARGUMENTS))
