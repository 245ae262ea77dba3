"""Runs of train.py, and what they leave; shared by its test files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from common import ROOT, SMALL, heed_ctrl_c

import train
from evaluation import Evaluation
from train_options import parse_arguments

SPECTRUM = (*SMALL, "--modality", "spectrum")


def train_here(*options: object) -> None:
    """As `python train.py` with these options, in this process."""
    train.main(parse_arguments(train.__doc__, list(map(str, options))))


def read_history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "training_history.json").read_text(encoding="utf-8"))


def checkpoint_of(output_dir: Path) -> Path:
    (path,) = (output_dir / "checkpoints").glob("best_model_*.pth")
    return path


def fail_in_epoch(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Make the next run end with this error in that epoch."""
    train_one_epoch = train.train_one_epoch

    def train_or_fail(*arguments) -> list[float]:
        if arguments[2] == number:
            raise error
        return train_one_epoch(*arguments)

    patch.setattr(train, "train_one_epoch", train_or_fail)


def files_in(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def evaluation_of(right: int, loss: float) -> Evaluation:
    """Of ten stars, so many of them classified right."""
    targets = np.arange(10) % 5
    return Evaluation(targets, np.eye(5)[np.where(np.arange(10) < right, targets, 0)], (loss, 0.0))


def train_and_interfere(
    after: str, interfere: Callable[[subprocess.Popen], None], *options: object, state_interval: float = 60
) -> tuple[int, str, str]:
    """Start train.py, and do that to the process once a printed line begins with `after`; exit status and output."""
    arguments = [str(option) for option in options]
    code = f"import sys, train; train.STATE_INTERVAL = {state_interval}; sys.argv = {['train.py', *arguments]}; "
    code += "train.run_as_script(lambda: train.main(train.parse_arguments(train.__doc__)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    printed = ""
    for line in process.stdout:
        printed += line
        if line.strip().startswith(after):
            interfere(process)
            break
    rest, errors = process.communicate(timeout=300)
    return process.returncode, printed + rest, errors
