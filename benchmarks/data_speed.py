"""How quickly the stars' files become batches, and how much memory that takes.

    python benchmarks/data_speed.py                                all figures: half an hour, 8 GB of disk
    python benchmarks/data_speed.py --figures decoding loading     some of them
    python benchmarks/data_speed.py --figures memory --many 20000  a smaller set

The yardstick is what the earlier reproduction does: one process reads each star's files anew whenever it
asks for the star, with astropy.io.fits, Pillow and torchvision's transforms. Both read the same files,
simulated ones, in a directory that is deleted at the end; a set of many stars is some files under many
names, so the system's file cache holds them, and the figures are the processor's, not the disk's.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from astropy.io import fits
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import cache  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from cache import PreparedStars  # noqa: E402
from data import CLASS_NAMES, Star  # noqa: E402
from model import IMAGE_BACKBONES, FusionModel  # noqa: E402
from simulate_sdss_data import simulate  # noqa: E402

FILES_PER_CLASS = 20  # different ones
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BATCH_SIZE = 32


class Row(NamedTuple):
    """A line of the table."""

    figure: str
    here: str
    yardstick: str = ""
    ratio: str = ""


# The yardstick


class NaiveDataset(Dataset):
    """The stars as the earlier reproduction reads them: both files of one star, each time it is asked for."""

    def __init__(self, data_dir: Path, stars: list[Star]) -> None:
        self.data_dir, self.stars = data_dir, stars
        self.transform = transforms.Compose(
            [
                transforms.Resize((data.IMAGE_SIZE, data.IMAGE_SIZE)),
                transforms.ToTensor(),
                transforms.Normalize(*IMAGENET),
            ]
        )

    def __len__(self) -> int:
        return len(self.stars)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        star = self.stars[index]
        with fits.open(data.spectrum_path(self.data_dir, star)) as hdus:
            flux = hdus[1].data["flux"][: data.SPECTRUM_LENGTH].astype(np.float32)
        flux = (flux - flux.min()) / (flux.max() - flux.min())
        image = Image.open(data.cutout_path(self.data_dir, star)).convert("RGB")
        return torch.from_numpy(flux), self.transform(image), CLASS_NAMES.index(star.subclass)


def naive_batch(stars: list[tuple[torch.Tensor, torch.Tensor, int]]) -> train.Batch:
    spectra, images, targets = default_collate(stars)
    return train.Batch(spectra, images, None, targets)


# The stars


def make_stars(directory: Path, originals: Path, count: int) -> list[Star]:
    """A data directory of `count` stars: the originals' files under many names."""
    directory.mkdir()
    files = [
        (data.spectrum_path(originals, star), data.cutout_path(originals, star))
        for star in data.read_catalog(data.catalog_path(originals))[0]
    ]
    random = np.random.default_rng(0)
    stars = []
    for number in range(count):
        spectrum, cutout = files[number % len(files)]
        ra, dec = random.uniform(0, 360), np.degrees(np.arcsin(random.uniform(-1, 1)))
        place = {"plate": 1 + number // 1000, "mjd": 52000, "fiberID": 1 + number % 1000}
        star = Star(f"star {number}", spectrum.parent.name, **place, ra=ra, dec=dec, simulated=True)
        for path, original in (
            (data.spectrum_path(directory, star), spectrum),
            (data.cutout_path(directory, star), cutout),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(original, path)
        stars.append(star)
    with open(data.catalog_path(directory), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Star._fields)
        writer.writerows(stars)
    return stars


def one_file_for_many_stars() -> contextlib.AbstractContextManager:
    """Inside, a spectrum need not be the star's that its name says."""
    return patch.object(data, "check_identity", lambda path, header, star: None)


# The figures


def seconds(action: Callable[..., object], *arguments: object, **options: object) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    action(*arguments, **options)
    return time.perf_counter() - started


def read_all(batches: Iterable) -> None:
    for _ in batches:
        pass


def training_batches(prepared: PreparedStars, indices: np.ndarray) -> DataLoader:
    """The batches of an epoch of training: shuffled, stars blended, images turned, spectra moved and with noise."""
    return train.TrainingLoader(prepared, indices, BATCH_SIZE, seed=0, image_dropout=0.5).epoch(1)


def naive_rate(directory: Path, stars: list[Star]) -> float:
    """Stars a second of the yardstick, on at most 1000 of them."""
    some = NaiveDataset(directory, stars[:1000])
    return len(some) / seconds(read_all, (some[index] for index in range(len(some))))


def measure_decoding(args: argparse.Namespace, originals: Path, work_dir: Path) -> list[Row]:
    directory = work_dir / "decoding"
    stars = make_stars(directory, originals, args.stars)
    naive = naive_rate(directory, stars)
    rows = []
    for workers in sorted({1, args.num_workers}):
        shutil.rmtree(directory / cache.CACHE_DIR, ignore_errors=True)
        here = args.stars / seconds(cache.open_stars, stars, directory, spectra=True, images=True, num_workers=workers)
        figure = f"files decoded into the cache, {workers} process{'es' * (workers > 1)}"
        rows.append(Row(figure, f"{here:.0f} stars/s", f"{naive:.0f} stars/s", f"× {here / naive:.1f}"))
    return rows


def measure_loading(args: argparse.Namespace, originals: Path, work_dir: Path) -> list[Row]:
    directory = work_dir / "loading"
    stars = make_stars(directory, originals, args.cached)
    prepared, _ = cache.read_stars(directory, "fusion", args.num_workers)
    took = seconds(cache.read_stars, directory, "fusion", args.num_workers)
    rows = [Row(f"start of a run, {args.cached:,} cached stars", f"{took:.2f} s")]
    naive = naive_rate(directory, stars)
    indices = np.arange(args.cached)
    loaders = {
        "as they are, in order": train.make_loader(prepared, indices, BATCH_SIZE),
        "shuffled, as training changes them": training_batches(prepared, indices),
    }
    for name, loader in loaders.items():
        here = args.cached / seconds(read_all, loader)
        row = Row(
            f"batches of {BATCH_SIZE} from the cache, {name}",
            f"{here:,.0f} stars/s",
            f"{naive:.0f} stars/s",
            f"× {here / naive:.0f}",
        )
        rows.append(row)
    return rows


class TimedLoader:
    """A loader's batches, and the seconds for which training waits for them."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.dataset, self.waited = loader, loader.dataset, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def measure_waiting(args: argparse.Namespace, originals: Path, work_dir: Path) -> list[Row]:
    directory = work_dir / "waiting"
    stars = make_stars(directory, originals, args.steps * BATCH_SIZE)
    prepared, _ = cache.read_stars(directory, "fusion", args.num_workers)
    device = train.choose_device("auto")
    model = FusionModel(image_backbone=args.image_backbone).to(device, memory_format=torch.channels_last)
    engine = train.Engine(model, device, train.choose_precision("auto", device))
    loaders = {
        "here": training_batches(prepared, np.arange(len(stars))),
        "yardstick": DataLoader(
            NaiveDataset(directory, stars), batch_size=BATCH_SIZE, shuffle=True, collate_fn=naive_batch
        ),
    }
    shares = {}
    for name, loader in loaders.items():
        timed = TimedLoader(loader)
        optimizer, scheduler = train.make_optimizer(model, 1e-4, epochs=1, steps_per_epoch=len(loader))
        took = seconds(train.train_one_epoch, engine, timed, optimizer, scheduler, lambda: None, "")
        wait, step = 1000 * timed.waited / len(loader), 1000 * took / len(loader)
        shares[name] = f"{wait / step:.2%} ({wait:.1f} ms of {step:.0f} ms a batch)"
    return [Row(f"training's wait for data, {args.image_backbone} on {device} in {engine.precision}", **shares)]


def measure_memory(args: argparse.Namespace, originals: Path, work_dir: Path) -> list[Row]:
    rows = []
    for count in sorted({args.cached, args.many}):
        directory = work_dir / f"memory-{count}"
        make_stars(directory, originals, count)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            took, memory = fresh.submit(peak_memory_of_an_epoch, directory, args.num_workers).result()
        in_arrays = count * sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in cache.ROWS.values())
        rows.append(
            Row(
                f"peak memory for {count:,} stars: decoded, split, all batches read ({took:.0f} s)",
                f"{memory / 1e9:.2f} GB",
                f"{in_arrays / 1e9:.2f} GB of prepared stars in memory",
            )
        )
        shutil.rmtree(directory)
    return rows


def peak_memory_of_an_epoch(directory: Path, num_workers: int) -> tuple[float, int]:
    """Seconds and bytes of resident memory, above what the imports take, of all that a run does with its stars."""
    multiprocessing.set_start_method("fork", force=True)  # of what decodes, which so has the patch below as well
    at_start = resident_bytes("VmRSS")
    started = time.perf_counter()
    with one_file_for_many_stars():
        prepared, _ = cache.read_stars(directory, "fusion", num_workers)
    splits = train.split_stars(prepared, 0.2, 0.0, seed=0)
    read_all(training_batches(prepared, splits["train"]))
    read_all(train.make_loader(prepared, splits["validation"], BATCH_SIZE))
    return time.perf_counter() - started, resident_bytes("VmHWM") - at_start


def resident_bytes(field: str) -> int:
    """VmRSS, this process's resident memory, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", status)[1])


FIGURES = {
    "decoding": measure_decoding,
    "loading": measure_loading,
    "waiting": measure_waiting,
    "memory": measure_memory,
}


def parse_arguments() -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
    add, count = parser.add_argument, data.number_between(int, 100, 10**7)
    add("--figures", nargs="+", choices=FIGURES, default=list(FIGURES), help="what to measure")
    add("--stars", type=count, default=4000, help="stars to decode")
    add("--cached", type=count, default=10_000, help="stars in the cache that is opened and read")
    add("--many", type=count, default=100_000, help="stars of the large set")
    add("--steps", type=data.number_between(int, 1, 10**6), default=6, help="training steps")
    add("--image-backbone", choices=IMAGE_BACKBONES, default="resnet152", help="of the network that waits for data")
    add("--num-workers", type=data.number_between(int, 1, 256), default=2, help="processes that decode")
    add("--work-dir", type=Path, help="where the files go for a while; by default, the system's temporary directory")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work_dir, one_file_for_many_stars():
        originals = Path(work_dir, "originals")
        simulate(originals, per_class=FILES_PER_CLASS, seed=0)
        rows = [row for figure in args.figures for row in FIGURES[figure](args, originals, Path(work_dir))]
    print(f"\n{machine}\n\n| figure | here | yardstick | |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def describe_machine() -> str:
    """On Linux alone, where the system tells of processor and memory as files."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores{gpu}; {versions}"


if __name__ == "__main__":
    data.run_as_script(main)
