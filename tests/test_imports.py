"""The modules' imports: no circle, no script below another module; and importing one does nothing."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

from common import ROOT, imports_of

MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")}
SCRIPTS = {name for name, tree in MODULES.items() if "__name__ == '__main__'" in ast.unparse(tree)}
GRAPH = {name: imports_of(tree) & MODULES.keys() for name, tree in MODULES.items()}


def test_imports_form_no_circle():
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(MODULES) > 20


def test_no_module_imports_a_script():
    """But train.py, which simulates the stars of its demo."""
    assert {"train", "predict", "show_star", "download_sdss_data", "simulate_sdss_data"} < SCRIPTS
    found = {(name, script) for name, imported in GRAPH.items() for script in imported & SCRIPTS}
    assert found <= {("train", "simulate_sdss_data")}


def test_the_paper_stands_alone():
    for name in ("model", "loss_sic"):
        assert imports_of(MODULES[name]) <= {"torch", "torchvision"}


def test_importing_any_module_does_nothing(tmp_path):
    names = ", ".join(sorted(MODULES))
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())
