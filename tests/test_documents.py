"""The documents agree with the project: tests that guarantees.md names, packages that requirements name."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from common import ROOT, imports_of


def test_guarantees_name_tests_that_are_there():
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named) > 30
    absent = [
        f"{file}::{name}"
        for file, name in named
        if not (path := ROOT / "tests" / file).exists() or f"\ndef {name}(" not in path.read_text(encoding="utf-8")
    ]
    assert not absent
    assert all("::" in line for line in text.splitlines() if line.startswith("| ") and "| test |" not in line)


def imported_packages(paths: list[Path]) -> set[str]:
    """The distributions, in small letters, of all imports that are neither Python's nor the project's own."""
    names = set().union(*(imports_of(ast.parse(path.read_text(encoding="utf-8"))) for path in paths))
    own = {path.stem for folder in (".", "tests", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    others, distributions = names - own - sys.stdlib_module_names, packages_distributions()
    return {distributions.get(name, [name])[0].lower() for name in others}


def required_packages(name: str) -> set[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {match[0].lower() for line in lines if (match := re.match(r"[\w-]+(?=>=)", line))}


def test_requirements_are_the_packages_that_are_imported():
    runtime, testing = required_packages("requirements.txt"), required_packages("requirements-test.txt")
    scripts = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert imported_packages(scripts) == runtime
    assert imported_packages(list((ROOT / "tests").glob("*.py"))) <= runtime | testing


def test_the_readmes_name_the_python_that_is_required():
    with open(ROOT / "pyproject.toml", "rb") as file:
        required = tomllib.load(file)["project"]["requires-python"].removeprefix(">=")
    for readme in ("README.md", "README.zh-CN.md"):
        assert f"Python ≥ {required}" in (ROOT / readme).read_text(encoding="utf-8")
