"""show_history.py: its table of runs, and its curves."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from common import run_script
from PIL import Image

import show_history
from cli import DataError


def make_run(training_id: str, f1: float, **config: object) -> dict:
    return {
        "config": {
            "training_id": training_id, "timestamp": "2026-11-23T06:39:42+00:00", "num_epochs": 3, "modality": "fusion",
            "recipe": "paper", "csv_file": "a/objects.csv", "stars": "400 SIMULATED stars", "held_out_stars": "ab12",
            "stars_by_class_and_split": {"validation": {"M0": 16}}, **config,
        },
        "epoch_metrics": {"train_loss": [3, 2, 1], "val_loss": [3.0, 2.5, 2.4], "val_f1": [0.2, f1, 0.5]},
        "final_metrics": {"final_val_f1_weighted": f1, "final_val_intervals_95": {"f1": [f1 - 0.04, f1 + 0.02]}},
        "total_training_time_seconds": 461.2,
    }  # fmt: skip


@pytest.fixture
def history(tmp_path) -> Path:
    runs = [
        make_run("20260101_000000", 0.912),
        make_run("20260102_000000", 0.975),
        make_run(
            "20260103_000000", 0.99, held_out_stars="cd34", last_epoch=2
        ),  # other validation stars: no rival of the first two
        {"config": {"training_id": "20250101_000000"}, "final_metrics": {"final_val_f1_weighted": 0.3}},
        {"config": "lost", "epoch_metrics": []},
        {},
    ]
    path = tmp_path / "training_history.json"
    path.write_text(json.dumps(runs), encoding="utf-8")
    return path


def run(*arguments: object) -> None:
    show_history.main(show_history.parse_arguments([str(argument) for argument in arguments]))


def refuse(message: str, *arguments: object) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        run(*arguments)


def test_the_table_of_runs_marks_the_best_of_each_set(history, capsys):
    run("--history", history)
    printed = capsys.readouterr().out
    header, *lines = printed.splitlines()[:7]
    for column in ("when", "set", "data", "recipe", "reads", "epochs", "val F1", "test F1", "time"):
        assert column in header
    assert [line.startswith("*") for line in lines] == [False, True, False, False, False, False]
    for part in ("20260102_000000", "2026-11-23 06:39", "400 SIMULATED stars", "paper", "fusion", "461 s",
                 "0.975 (0.935 to 0.995)"):  # fmt: skip
        assert part in lines[1]
    assert "2 of 3" in lines[2] and "of 3" not in lines[1]
    column = header.index("set")
    assert [line[column] for line in lines] == ["1", "1", "2", "–", "–", "–"]
    assert "0.300" in lines[3] and "–" in lines[3]  # of an old record, its own entries
    assert set(lines[4].split()) == set(lines[5].split()) == {"–"}


def test_curves_of_runs_over_each_other(history, tmp_path, capsys):
    output = tmp_path / "curves.png"
    options = ("--history", history, "--output", output)
    run("20260101_000000", "20260103_000000", *options)
    printed = capsys.readouterr().out
    assert str(output) in printed and "20260102_000000" not in printed
    first = output.read_bytes()
    assert np.asarray(Image.open(output).convert("L")).std() > 10
    run("20260101_000000", "20260102_000000", *options)  # its own picture is replaced
    assert output.read_bytes() != first
    refuse("no run 19990101; it holds 20260101_000000, 20260102", "20260101_000000", "19990101", *options)
    refuse("run 20250101_000000 has no curves", "20260101_000000", "20250101_000000", *options)
    Image.new("RGB", (9, 9)).save(output)
    refuse("this script did not write it", "20260101_000000", "20260102_000000", *options)
    with pytest.raises(SystemExit) as exit_:
        run("20260101_000000")
    assert exit_.value.code == 2 and "name two runs or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "damaged, or no JSON file"),
        ("\udcff", "damaged, or no JSON file"),
        ('{"runs": []}', "not a history"),
        ("[1, 2]", "not a history"),
        ("[]", "no run in it yet"),
        (None, "no such file"),
    ],
)
def test_a_history_that_cannot_be_read_is_a_clear_error(tmp_path, content, message):
    path = tmp_path / "history.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    refuse(f"{path}: {message}", "--history", path)


def test_an_error_is_one_line(tmp_path):
    done = run_script("show_history.py", cwd=tmp_path)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("show_history.py: error: training_history.json: no such file")


def test_this_repositorys_history_on_a_terminal_that_is_not_utf_8():
    done = run_script("show_history.py", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and "val F1" in done.stdout
