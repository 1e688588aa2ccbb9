"""The checks of check_viewer.py, check_chat_page.py and check_serve.py: they are counted, and the first that fails ends the
program."""

import os
import sys

count = 0


def check(condition, *what):
    global count
    count += 1
    if not condition:
        sys.exit(f"check {count} failed: {' '.join(map(str, what))}")


def log_cases(name):
    """Reports the number of checks to the file of $GD_CASE_LOG, as the suites of Rust do."""
    if log := os.environ.get("GD_CASE_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{name} {count}\n")
