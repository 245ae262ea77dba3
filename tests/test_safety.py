"""Nobody gets in, and nothing is lost: no file outside the data directory, no code from data, no record or file gone.

Further tests of the same promises: names and classes of a catalogue, checkpoints (test_bad_input.py, test_mutants.py);
TLS, redirects, sizes, kill -9 and full disks of the downloader (test_faults.py).
"""

import ast
import errno
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import sdss_server
from common import ROOT
from filelock import FileLock
from test_faults import File, download, files_of, make_stars, server, write_catalog  # noqa: F401, a fixture

import cache
import data
import history
from data import Star
from simulate_sdss_data import simulate

STAR = Star("a", "M1", 300, 51900, 2, 150.0, 1.0)


# Links: those of folders are followed, so that spectra/ may lie on another disk; those of files are not written through


def test_a_link_in_place_of_a_file_is_replaced_and_its_target_kept(tmp_path, server):  # noqa: F811
    stars = make_stars(server, 1)
    write_catalog(tmp_path, stars)
    target = tmp_path / "precious"
    target.write_text("not ours")
    files = files_of(tmp_path, stars[0], server)
    leftover = files[0].path.with_name(".spec-abc.partial.fits")
    for path in (*(file.path for file in files), tmp_path / "download_failures.csv", leftover):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    assert download(tmp_path, server) == 0
    assert target.read_text() == "not ours"
    assert all(not file.path.is_symlink() and file.path.read_bytes() == file.content for file in files)
    assert not leftover.is_symlink()


def test_a_link_in_place_of_the_lock_is_not_written_through(tmp_path, server):  # noqa: F811
    write_catalog(tmp_path, make_stars(server, 1))
    target = tmp_path / "precious"
    target.write_text("not ours")
    (tmp_path / ".download.lock").symlink_to(target)
    with pytest.raises(OSError, match=r"\.download\.lock"):
        download(tmp_path, server)
    assert target.read_text() == "not ours"


def test_a_link_in_place_of_a_folder_is_followed(tmp_path, server):  # noqa: F811
    stars = make_stars(server, 1)
    write_catalog(tmp_path, stars)
    (tmp_path / "other disk").mkdir()
    (tmp_path / "spectra").symlink_to(tmp_path / "other disk")
    assert download(tmp_path, server) == 0
    file: File = files_of(tmp_path, stars[0], server)[0]
    assert (tmp_path / "other disk" / stars[0].subclass / file.path.name).read_bytes() == file.content


# No code from data


def test_an_array_of_objects_in_the_cache_is_not_unpickled(tmp_path):
    simulate(tmp_path / "stars", per_class=1, seed=1)
    stars, _ = data.read_catalog(tmp_path / "stars" / "objects.csv")
    everything = {"spectra": True, "images": True, "num_workers": 0}
    cache.open_stars(stars, tmp_path / "stars", **everything)
    directory = tmp_path / "stars" / cache.CACHE_DIR

    class Intruder:
        def __reduce__(self) -> tuple:
            return Path.write_text, (tmp_path / "intruder", "was here")

    np.save(directory / "spectra.npy", np.array([Intruder()] * len(stars)), allow_pickle=True)
    index = json.loads((directory / "index.json").read_text())
    index["arrays"]["spectra"] = cache.file_stamp(directory / "spectra.npy")
    (directory / "index.json").write_text(json.dumps(index))

    _, arrays = cache.open_stars(stars, tmp_path / "stars", **everything)
    assert np.array_equal(arrays["spectra"][np.arange(1)][0], data.load_spectrum(tmp_path / "stars", stars[0]))
    assert not (tmp_path / "intruder").exists()


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
    "torch.hub.load", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive",
}  # fmt: skip
FORBIDDEN_OPTIONS = {("shell", True), ("verify", False), ("allow_pickle", True), ("weights_only", False)}


def test_no_script_runs_a_shell_executes_data_or_turns_a_check_off():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
    assert len(scripts) > 10
    for script in scripts:
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                where, name = f"{script.name}, line {node.lineno}", ast.unparse(node.func)
                assert name not in FORBIDDEN, where
                options = {(keyword.arg, getattr(keyword.value, "value", None)) for keyword in node.keywords}
                assert not options & FORBIDDEN_OPTIONS, where
                assert name != "torch.load" or ("weights_only", True) in options, where
                reads_templates = script.name == "template_stars.py" and ("allow_pickle", False) in options
                assert name != "np.load" or reads_templates, where


# Simulated stars are known also by their images


def test_a_simulated_image_alone_says_so(tmp_path):
    simulate(tmp_path / "stars", per_class=1, seed=1)
    catalog = tmp_path / "stars" / "objects.csv"
    stars = [star._replace(simulated=False) for star in data.read_catalog(catalog)[0]]
    for star in stars:
        data.spectrum_path(tmp_path / "stars", star).unlink()
    checked, _ = cache.open_stars(stars, tmp_path / "stars", spectra=False, images=True, num_workers=0)
    assert data.describe([entry.star for entry in checked]) == "5 SIMULATED stars"


def test_an_image_of_sdss_does_not(tmp_path):
    path = data.cutout_path(tmp_path, STAR)
    path.parent.mkdir(parents=True)
    path.write_bytes(sdss_server.make_cutout_bytes(1.0, 1.0))
    assert data.read_cutout(path).simulated is False


# The history


def append_runs(path: Path, name: str, count: int) -> None:
    for number in range(count):
        history.put_into_history(path, {"config": {"training_id": f"{name} {number}"}})


def test_runs_that_end_at_once_all_stand_in_the_history(tmp_path):
    path, processes = tmp_path / "training_history.json", multiprocessing.get_context("fork")
    writers = [processes.Process(target=append_runs, args=(path, name, 40)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    ids = [run["config"]["training_id"] for run in json.loads(path.read_text())]
    assert sorted(ids) == sorted(f"{name} {number}" for name in "ab" for number in range(40))
    for name in "ab":  # each one's own in its order
        assert [i for i in ids if i[0] == name] == [f"{name} {number}" for number in range(40)]


def test_a_history_damaged_twice_is_kept_twice(tmp_path, capsys):
    path = tmp_path / "training_history.json"
    for content in ("first", "second"):
        path.write_text(content)
        history.put_into_history(path, {"config": {"training_id": "1"}})
    kept = sorted(tmp_path.glob("training_history.damaged-*"))
    assert [file.read_text() for file in kept] == ["first", "second"]
    assert len(json.loads(path.read_text())) == 1


def test_a_path_that_is_not_utf_8_can_be_recorded(tmp_path):
    path, name = tmp_path / "training_history.json", os.fsdecode(b"\xe9toiles")
    for training_id in "12":
        history.put_into_history(path, {"config": {"training_id": training_id, "data_dir": name}})
    assert [run["config"]["data_dir"] for run in json.loads(path.read_text(encoding="utf-8"))] == [name, name]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_costs_no_earlier_file(tmp_path, monkeypatch, step):
    path = tmp_path / "training_history.json"
    history.put_into_history(path, {"config": {"training_id": "1"}})
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, step, full)
        history.put_into_history(path, {"config": {"training_id": "2"}})
    assert path.read_bytes() == before and not list(tmp_path.glob(".*partial*"))
    history.put_into_history(path, {"config": {"training_id": "3"}})
    assert len(json.loads(path.read_text())) == 2
    with FileLock(tmp_path / ".training_history.json.lock", timeout=0):
        pass  # nobody was left holding it
