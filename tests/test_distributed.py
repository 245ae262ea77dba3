"""Several processes are one: the same losses, gradients and validation figures, by gloo on this machine's CPUs.

python -m pytest -m slow tests/test_distributed.py       the gradients of both inputs
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, SMALL, random_stars

import distributed
import train
from classifier import Classifier
from dataset import StarLoader
from evaluation import evaluate
from recipe import PAPER
from train_options import parse_arguments
from trainer import Trainer


def torchrun(script: Path, *arguments: object) -> str:
    """Run a script in two processes; returns their output."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script]
    done = subprocess.run(
        list(map(str, (*launch, *arguments))), env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_two_processes_train_as_one(stars_dir, tmp_path):
    """As a user starts them: one record, one set of files, and figures of all stars."""
    options = ("--data-dir", stars_dir, *SMALL, "--modality", "spectrum")
    train.main(parse_arguments(train.__doc__, [*map(str, options), "--output-dir", str(tmp_path / "one")]))
    printed = torchrun(ROOT / "train.py", *options, "--output-dir", tmp_path / "two")
    assert sum("val loss" in line for line in printed.splitlines()) == 2 and printed.count("Open these") == 1
    (one,), (two,) = (json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("one", "two"))
    assert (one["config"]["processes"], two["config"]["processes"]) == (1, 2)
    del one["epoch_metrics"]["seconds"]
    for name, curve in one["epoch_metrics"].items():
        assert two["epoch_metrics"][name] == pytest.approx(curve, rel=1e-3), name
    assert len(list((tmp_path / "two" / "checkpoints").glob("*.pth"))) == 1


def test_variables_that_a_scheduler_left_do_not_count(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with distributed.process_group():
        assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)


def figures() -> dict[str, object]:
    """Of a step of the paper's loss on 12 stars, and of an evaluation of 7 others; then the buffers of each process
    after another step. In the first step, batch norms are as in evaluation: on CPUs each process has its own."""
    torch.manual_seed(0)
    classifier = Classifier(replace(PAPER, image_backbone="resnet18", num_layers=1, batch_size=12)).eval()
    prepared, device = random_stars(4), torch.device("cpu")
    trainer = Trainer(classifier, epochs=2, steps_per_epoch=1)
    (batch,) = StarLoader(prepared, np.arange(12), device).epoch(12, torch.Generator().manual_seed(1))
    found = {"stars": len(batch.targets), "losses": trainer.step(batch)}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in classifier.named_parameters()}
    validation = evaluate(classifier, StarLoader(prepared, np.arange(12, 19), device))
    found |= {"validation losses": validation.losses, "retrieval accuracy": validation.retrieval_accuracy}
    trainer.classifier.train()
    trainer.step(batch)
    distributed.synchronise_buffers(classifier)
    found |= {"buffers": distributed.gather_objects(dict(classifier.named_buffers()))}
    return found | {"logits": sorted(validation.logits.tolist())}


@pytest.mark.slow
def test_two_processes_take_the_gradient_of_one_contrast(tmp_path):
    torchrun(Path(__file__), tmp_path / "two.pth")
    one, two = figures(), torch.load(tmp_path / "two.pth", weights_only=True)
    assert (one.pop("stars"), two.pop("stars")) == (12, 6) and one.keys() == two.keys()
    buffers, others = two.pop("buffers")
    assert len(one.pop("buffers")) == 1 and all(torch.equal(value, others[name]) for name, value in buffers.items())
    for name, value in one.items():
        value, other = torch.as_tensor(value).double(), torch.as_tensor(two[name]).double()
        assert torch.allclose(value, other, rtol=1e-3, atol=1e-3 * value.abs().max().item() + 1e-9), name


if __name__ == "__main__":
    with distributed.process_group():
        if (found := figures()) and distributed.rank() == 0:
            torch.save(found, sys.argv[1])
