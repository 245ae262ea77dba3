"""Several processes are one: the same loss, gradients and validation figures, by gloo on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, run_script

import data
import distributed
import train
from cache import PreparedStars
from data import Star
from model import FusionModel
from simulate_sdss_data import simulate

STARS = 20  # of each class
BATCH_SIZE = 12


def make_stars() -> PreparedStars:
    random = torch.Generator().manual_seed(0)
    number = STARS * len(data.CLASS_NAMES)
    return PreparedStars(
        [Star(str(i), data.CLASS_NAMES[i % 5], i + 1, 52000, 1) for i in range(number)],
        1 + 0.3 * torch.randn(number, data.SPECTRUM_LENGTH, generator=random),
        torch.randint(256, (number, 3, 128, 128), dtype=torch.uint8, generator=random),
        torch.arange(number) % 5,
    )


def work(path: Path) -> None:
    """One epoch of a part of the stars, then an evaluation of the others; the first process writes all figures."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that an error is not taken for rounding, nor the reverse
    prepared = make_stars()
    with distributed.process_group():
        model = distributed.prepare(FusionModel(image_backbone="resnet18", num_layers=2))
        model.spectrum_normalisation.fit(prepared.spectra)
        engine = train.Engine(model, torch.device("cpu"), "fp32", sic_negatives="other-classes")
        trained = engine._replace(model=distributed.share_gradients(model))
        loader = train.TrainingLoader(prepared, np.arange(60), BATCH_SIZE, seed=0, image_dropout=0.5)
        batch = next(iter(loader.epoch(1)))
        trained.model.train()
        loss, _ = trained.loss(batch)
        loss.backward()
        figures = {"loss": loss.item(), "stars": len(batch.targets)}
        figures |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        figures |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
        optimizer, scheduler = train.make_optimizer(model, 1e-4, epochs=2, steps_per_epoch=len(loader))
        figures["epoch"] = train.train_one_epoch(trained, loader.epoch(2), optimizer, scheduler, lambda: None, "")
        train.measure_batch_norm(engine, loader.epoch(2, augmented=False))
        validation = train.evaluate(engine, train.make_loader(prepared, np.arange(60, 97), BATCH_SIZE))
        figures |= {"validation": validation.loss, "scores": validation.scores()}
    if distributed.rank() == 0:
        torch.save(figures, path)


def run_processes(number: int, *arguments: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(number),
    }
    command = [sys.executable, *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(number)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_two_processes_are_one(tmp_path):
    for number in (1, 2):
        run_processes(number, __file__, tmp_path / f"{number}.pth")
    one, two = (torch.load(tmp_path / f"{name}.pth", weights_only=False) for name in (1, 2))
    assert (one.pop("stars"), two.pop("stars")) == (BATCH_SIZE, BATCH_SIZE // 2)
    assert one.keys() == two.keys() and sum(name.startswith("gradient") for name in one) > 100
    assert two.pop("scores") == pytest.approx(one.pop("scores"))
    for name, value in one.items():
        value, other = torch.as_tensor(value), torch.as_tensor(two[name])
        assert torch.allclose(value, other, rtol=1e-5, atol=1e-5 * value.abs().max().item() + 1e-9), name


def test_torchrun_trains_as_one_run(tmp_path):
    """As a user starts it: one record, one set of files, figures of all stars; the run with one process is the same."""
    simulate(tmp_path / "stars", per_class=12, seed=7)
    options = ["--data-dir", tmp_path / "stars", "--modality", "spectrum", "--batch-size", 16, "--epochs", 2]
    options += ["--precision", "fp32", "--num-workers", 1, "--device", "cpu"]  # there may be one GPU for both
    assert run_script("train.py", *options, "--output-dir", tmp_path / "one").returncode == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", ROOT / "train.py"]
    two = [*launcher, *options, "--output-dir", tmp_path / "two"]
    done = subprocess.run(list(map(str, two)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sum("val loss" in line for line in done.stdout.splitlines()) == 2 and done.stdout.count("Open these") == 1
    one, two = (json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("one", "two"))
    assert len(two) == 1 and two[0]["config"]["processes"] == 2
    for name, values in one[0]["epoch_metrics"].items():
        assert two[0]["epoch_metrics"][name] == pytest.approx(values, rel=1e-3), name
    assert len(list((tmp_path / "two" / "checkpoints").glob("*.pth"))) == 1


if __name__ == "__main__":
    work(Path(sys.argv[1]))
