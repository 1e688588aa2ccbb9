"""Compares every scalar that the tensorboard package reads from a run with the run's train.jsonl.

Tags are grouped. A number that is the same in every step has no tag, and of the constant values before the first change only
the first and the last are there.

    python3 scripts/ci/check_tensorboard.py RUN

Needs `pip install tensorboard`. Exit code 1 where a value, step or time differs.
"""

import json
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(line, prefix=""):
    """The numbers of a step's line by tag, `/` between nested keys."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value


def tag(name):
    """The tag of a number of the log."""
    known = {"loss": "loss/train", "valid_loss": "loss/valid", "valid_loss_ema": "loss/valid_ema",
             "lr": "optimizer/learning_rate", "grad_norm": "optimizer/gradient_norm",
             "skipped": "optimizer/skipped_updates"}
    if name in known:
        return known[name]
    if name.startswith("heads/"):
        return "selection/" + name.removeprefix("heads/")
    return ("selection/" if name in ("churn", "hardness", "candidates") else "system/") + name


def drawn(points):
    """The points of a number that are written: none of a constant."""
    constant = next((n for n, point in enumerate(points) if point[2] != points[0][2]), None)
    return [] if constant is None else points[:1] + points[max(1, constant - 1):]


def single(x):
    """A number rounded to single precision."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def main():
    run = Path(sys.argv[1])
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    expected = {}
    for line in lines:
        if "event" not in line:
            for name, value in scalars(line):
                if name not in ("step", "time"):
                    expected.setdefault(tag(name), []).append((line["step"], line["time"], single(value)))
    constants = [name for name, points in expected.items() if not drawn(points)]
    expected = {name: drawn(points) for name, points in expected.items() if name not in constants}
    # 0 keeps every event.
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    found = {
        name: [(e.step, e.wall_time, e.value) for e in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    for name in wrong:
        print(f"{name}: log {expected.get(name)}, tensorboard {found.get(name)}", file=sys.stderr)
    values = sum(map(len, expected.values()))
    if wrong or values == 0:
        sys.exit(f"error: {run}: {len(wrong)} of {len(expected)} tags differ, {values} values")
    print(f"{run}: {values} values of {len(expected)} tags are equal, {len(constants)} constants are not drawn")


main()
