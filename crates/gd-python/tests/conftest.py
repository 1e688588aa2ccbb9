"""What the tests share."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def rng():
    return np.random.default_rng(26)


@pytest.fixture(scope="session")
def gd_program():
    """Runs the program of the environment variable GD, and returns its stdout."""
    program = os.environ["GD"]

    def run(*args):
        done = subprocess.run([program, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def trained(gd_program, tmp_path_factory):
    """A small model that was trained for a few steps."""
    out = tmp_path_factory.mktemp("model") / "run"
    gd_program("train", "--config", ROOT / "crates/gd-model/tests/fixtures/small.json", "--out", out)
    return out


def pytest_terminal_summary(terminalreporter):
    """Reports the number of cases as the suites of Rust do."""
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", [])]
    log = os.environ.get("GD_CASE_LOG")
    if log:
        torch = sum("test_torch" in name for name in passed)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"python {len(passed) - torch}\n")
            if torch:
                file.write(f"python-torch {torch}\n")
