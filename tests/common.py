"""Shared by several test files."""

import ast
import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from cache import PreparedStars
from catalog import CLASS_NAMES, Star, read_catalog
from preparation import SPECTRUM_LENGTH
from star_files import catalog_path

ROOT = Path(__file__).resolve().parent.parent
# Real SDSS spectra and templates, which are not part of this repository; tests that want them skip without.
SHARED_DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))

# A run of seconds: options of train.py. On the CPU, where the same seed gives the same bits.
SMALL = ("--image-backbone", "resnet18", "--image-weights", "none", "--layers", 1, "--batch-size", 16)
SMALL += ("--epochs", 2, "--precision", "fp32", "--device", "cpu", "--num-workers", 1)


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run_script(
    script: str, *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user starts it, to its end."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def heed_ctrl_c() -> None:
    """As preexec_fn of a process: some shells make their background jobs, and all that these start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def imports_of(tree: ast.AST) -> set[str]:
    """The first parts of the names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def stars_of(data_dir: Path) -> list[Star]:
    """The stars of the catalogue of a data directory."""
    return read_catalog(catalog_path(data_dir))[0]


def write_catalog(data_dir: Path, stars: list[Star]) -> None:
    with open(catalog_path(data_dir), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Star._fields, *stars])


def checkpoint_contents() -> dict[str, object]:
    """The contents of a checkpoint beside the classifier, as after one epoch on no stars."""
    config = {"class_names": list(CLASS_NAMES), "stars": "0 stars", "batch_size": 2}
    splits = {"train": [], "validation": [], "test": []}
    return {"config": config, "splits": splits, "references": {}, "epoch": 1}


def random_stars(per_class: int, image_size: int = 32, seed: int = 0) -> PreparedStars:
    """Stars of random fluxes and pixels, class by class; each its own place on the sky."""
    random, count = torch.Generator().manual_seed(seed), per_class * len(CLASS_NAMES)
    targets = torch.arange(len(CLASS_NAMES)).repeat_interleave(per_class)
    flux = 1 + 0.3 * torch.randn(count, SPECTRUM_LENGTH, generator=random)
    return PreparedStars(
        [Star(f"star {i}", CLASS_NAMES[k], 1 + i, 52000, 1, float(i % 360), 0.0) for i, k in enumerate(targets)],
        torch.stack([flux, torch.full_like(flux, 25.0)], dim=1),
        torch.randint(256, (count, 3, image_size, image_size), dtype=torch.uint8, generator=random),
        targets,
    )
