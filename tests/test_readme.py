"""Every command and every piece of Python in the README works as it stands there, both READMEs give the same ones."""

import glob
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import sdss_server
from common import ROOT, run_script

from catalog import CLASS_NAMES, Star, encode_spec_obj_id
from simulate_sdss_data import simulate
from star_files import catalog_path

pytestmark = pytest.mark.slow

README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
# What makes a run short; it goes after the README's own options.
SHORTER = {
    "train.py": "--epochs 1 --batch-size 16 --image-backbone resnet18 --layers 1 --image-weights none",
    "simulate_sdss_data.py": "--per-class 8",
}
RUN_ELSEWHERE = {
    "train.py --demo": "tests/test_train.py::test_demo_makes_its_stars_once_and_keeps_to_its_directory",
    "python -m pytest": "tests/test_readme.py::test_command",
}


def blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(readme: Path) -> list[str]:
    """Those of the shell blocks, without their comments."""
    return [re.sub(r"\s+#.*", "", line) for block in blocks(readme, "sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A user's own directory, with stars and a run on them; DIR holds others."""
    directory = tmp_path_factory.mktemp("user") / "stars"
    simulate(directory, per_class=8, seed=1, min_snr=5)
    simulate(directory / "DIR", per_class=5, seed=2, min_snr=5)
    done = run_script("train.py", *SHORTER["train.py"].split(), cwd=directory)
    assert done.returncode == 0, done.stderr
    # From here on as if from SDSS, which has no files of simulated stars to fetch.
    stars = pd.read_csv(catalog_path(directory), dtype=str).drop(columns="simulated")
    stars.to_csv(catalog_path(directory), index=False)
    return directory


@pytest.fixture(scope="module")
def server() -> Iterator[sdss_server.SdssServer]:
    with sdss_server.running_server() as running:
        for number in range(800):
            plate, fiberID, subclass = 300 + number // 500, 1 + number % 500, CLASS_NAMES[number % 5]
            name = str(encode_spec_obj_id(plate, 52_000, fiberID, 26))
            running.list_star(Star(name, subclass, plate, 52_000, fiberID, 150.0, 1.0), snr=5 if number < 400 else 15)
        yield running


def fill_in(text: str, directory: Path) -> str:
    """The README's text with checkpoints that are there in place of best_model_ID.pth."""

    def checkpoint(match: re.Match) -> str:
        return str(next(directory.glob(f"{match[1]}*.pth")).relative_to(directory))

    return re.sub(r"([\w/]*checkpoints/best_model_)ID\.pth", checkpoint, text)


@pytest.mark.parametrize("command", [line for line in commands(README) if not line.endswith(tuple(RUN_ELSEWHERE))])
def test_command(command, directory, server):
    _, *words = shlex.split(fill_in(command, directory))
    arguments = [file for word in words for file in (glob.glob(word, root_dir=directory) if "*" in word else [word])]
    script = next(argument for argument in arguments if argument.endswith(".py"))
    arguments[arguments.index(script)] = str(ROOT / script)
    arguments += shlex.split(SHORTER.get(script, "") if not {"--evaluate", "--help"} & set(arguments) else "")
    if script == "download_sdss_data.py":
        arguments += ["--sas-url", server.sas_url, "--skyserver-url", server.skyserver_url]
    done = subprocess.run([sys.executable, *arguments], cwd=directory, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_run_elsewhere_are_there():
    for end, test in RUN_ELSEWHERE.items():
        path, name = test.split("::")
        assert any(line.endswith(end) for line in commands(README)), end
        assert f"def {name}(" in (ROOT / path).read_text(), test


def test_pieces_of_python_run_one_after_the_other(directory):
    pieces = fill_in("\n".join(blocks(README, "python")), directory)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{pieces}"],
        cwd=directory,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "final_val_f1_weighted" in done.stdout and "Recipe(" in done.stdout


def test_the_chinese_readme_has_the_same_commands_figures_and_chapters():
    for language in ("sh", "python"):
        without_comments = [
            [re.sub(r"\s+#.*", "", block) for block in blocks(readme, language)] for readme in (README, CHINESE)
        ]
        assert without_comments[0] == without_comments[1]
    texts = [readme.read_text(encoding="utf-8") for readme in (README, CHINESE)]
    for pattern in (r"\d\.\d{3}", r"\]\((http[^)]*|benchmarks[^)]*)\)", r"^#+ "):
        found = [sorted(re.findall(pattern, text, flags=re.M)) for text in texts]
        assert found[0] == found[1], pattern
