"""Compares every scalar that the tensorboard package reads from a run with the run's train.jsonl.

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


def single(x):
    """A number rounded to single precision."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def main():
    run = Path(sys.argv[1])
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    expected = {}
    for line in lines:
        if "event" not in line:
            for tag, value in scalars(line):
                if tag not in ("step", "time"):
                    expected.setdefault(tag, []).append((line["step"], line["time"], single(value)))
    # 0 keeps every event.
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    found = {
        tag: [(e.step, e.wall_time, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    wrong = sorted(tag for tag in expected.keys() | found.keys() if expected.get(tag) != found.get(tag))
    for tag in wrong:
        print(f"{tag}: log {expected.get(tag)}, tensorboard {found.get(tag)}", file=sys.stderr)
    values = sum(map(len, expected.values()))
    if wrong or values == 0:
        sys.exit(f"error: {run}: {len(wrong)} of {len(expected)} tags differ, {values} values")
    print(f"{run}: {values} values of {len(expected)} tags are equal")


main()
