"""The history of all runs: nothing that stands in it is lost."""

import errno
import json
import multiprocessing
import os
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from common import random_stars

import history
from cli import DataError
from history import claim_training_id, put_into_history, stars_digest


def run(training_id: str, **config: object) -> dict:
    return {"config": {"training_id": training_id, **config}}


def read(path: Path) -> list:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "training_history.json"


def test_a_run_is_appended_or_takes_its_own_place(path):
    for record in (run("1"), run("2"), run("1", again=True)):
        put_into_history(path, record)
    assert read(path) == [run("2"), run("1", again=True)]


@pytest.mark.parametrize("content", ['[{"config": {"training_id": "2025', "{}", "[" * 100_000, "", "\udcff"])
def test_a_damaged_history_is_kept_under_another_name(path, capsys, content):
    kept = []
    for _ in range(2):
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
        kept.append(path.read_bytes())
        put_into_history(path, run("20261123_120000"))
    aside, printed = sorted(path.parent.glob("training_history.damaged-20261123_120000*.json")), capsys.readouterr().err
    assert [file.read_bytes() for file in aside] == kept and all(file.name in printed for file in aside)
    assert read(path) == [run("20261123_120000")]


def test_entries_of_other_programs_stay(path):
    """json.dump writes NaN where it should not, and readers of Python take it: so do we."""
    path.write_text('[{"epoch_metrics": {"val_loss": [NaN]}}, {"config": "none"}, "a note"]')
    put_into_history(path, run("1"))
    assert len(read(path)) == 4 and np.isnan(read(path)[0]["epoch_metrics"]["val_loss"][0])


def append_runs(path: Path, name: str, count: int) -> None:
    for number in range(count):
        put_into_history(path, run(f"{name} {number}"))


def test_runs_that_end_at_once_are_all_recorded(path):
    processes = multiprocessing.get_context("fork")
    writers = [processes.Process(target=append_runs, args=(path, name, 25)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    ids = [record["config"]["training_id"] for record in read(path)]
    for name in "ab":
        assert [i for i in ids if i[0] == name] == [f"{name} {number}" for number in range(25)]


def test_a_path_that_is_not_utf_8_can_be_recorded(path):
    name = os.fsdecode(b"\xe9toiles")
    for training_id in "12":
        put_into_history(path, run(training_id, data_dir=name))
    assert [record["config"]["data_dir"] for record in read(path)] == [name, name]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_costs_no_earlier_record(path, monkeypatch, step):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put_into_history(path, run("1"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, step, full)
        put_into_history(path, run("2"))
    assert read(path) == [run("1")] and not list(path.parent.glob(".*partial*"))
    put_into_history(path, run("3"))
    assert read(path) == [run("1"), run("3")]


def test_training_ids_of_one_second_differ(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 11, 23, 12, 0, 0)

    monkeypatch.setattr(history, "datetime", Clock)
    with claim_training_id(tmp_path) as first, claim_training_id(tmp_path) as second:
        assert (first, second) == ("20261123_120000", "20261123_120000_2")
        (tmp_path / "checkpoints" / f"best_model_{first}.pth").touch()
    with claim_training_id(tmp_path) as third:
        assert third == second  # never used: its run left nothing
        with pytest.raises(DataError, match="goes on in another process"), claim_training_id(tmp_path, third):
            pass


def test_a_digest_is_of_the_stars_not_of_their_order():
    stars = random_stars(1).stars
    assert stars_digest(stars) == stars_digest(stars[::-1]) != stars_digest(stars[:-1])
