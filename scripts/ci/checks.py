"""The checks of check_viewer.py, check_chat_page.py and check_serve.py: they are counted, and the first that fails ends the
program."""

import sys

count = 0


def check(condition, *what):
    global count
    count += 1
    if not condition:
        sys.exit(f"check {count} failed: {' '.join(map(str, what))}")
