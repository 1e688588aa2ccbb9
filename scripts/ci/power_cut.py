#!/usr/bin/env python3
"""Cuts the power under `gd`, and checks that everything that it reported as saved is on the disk.

    scripts/ci/power_cut.py target/debug/gd
    scripts/ci/power_cut.py target/debug/gd --cuts 100 --filesystem xfs

The disk is a file system in a file, mounted over a loop device. A cut shuts the file system down without writing its log, so
that what was not synced is lost, and mounts it again. A training runs through all cuts: after each of them its newest checkpoint
is whole and no older than the one that was reported, `gd eval`, `gd generate` and `gd train --resume` agree on it, and at the end
weights, optimizer and log are those of a run without cuts. Every fifth cut meets a preparation of data and a conversion instead.

Before that, cuts meet a training whose syncs do nothing (strace lets them return at once). One of them must lose something, else
the cuts would show nothing.

Needs Linux, root, mkfs of the file systems (Debian: e2fsprogs, xfsprogs), unshare, and strace. Exit code 1 where something was
lost, 77 where this machine cannot mount the file systems, so that nothing was tried.
"""

import argparse
import fcntl
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
IMAGE_BYTES = 512 << 20
# _IOR('X', 125, __u32), which ext4 and xfs share, and its argument for a shutdown that does not write the log.
SHUTDOWN = 0x8004587D
WITHOUT_LOG = 2
CANNOT_RUN = 77
# Cuts of a training without syncs, of which one must lose something.
CONTROL_CUTS = 5
OTHER_COMMANDS_EVERY = 5
# Longest wait for the end of a program whose disk is gone.
PATIENCE = 60
NO_SYNCS = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=fsync,fdatasync", "-e",
            "inject=fsync,fdatasync:retval=0", "-o", "/dev/null"]
RUN = "deep/er/run"
RECIPE = Path(__file__).parents[2] / "crates/gd-model/tests/fixtures/small.json"
SAMPLE = Path(__file__).parents[2] / "models/text/sample.txt"


class Lost(Exception):
    """What a cut has lost."""


class Disk:
    """A file system in a file, which is mounted."""

    def __init__(self, filesystem, folder):
        self.filesystem, self.image, self.root = filesystem, folder / "image", folder / "mounted"
        self.root.mkdir()
        self.image.touch()
        os.truncate(self.image, IMAGE_BYTES)
        subprocess.run([*MKFS[filesystem], self.image], check=True, stdout=subprocess.DEVNULL)
        self.mount()

    def mount(self):
        subprocess.run(["mount", "-t", self.filesystem, "-o", "loop", self.image, self.root], check=True)

    def unmount(self):
        subprocess.run(["umount", self.root], check=True)

    def cut(self):
        root = os.open(self.root, os.O_RDONLY)
        fcntl.ioctl(root, SHUTDOWN, struct.pack("I", WITHOUT_LOG))
        os.close(root)

    def restart(self):
        self.unmount()
        self.mount()


class Program:
    """`gd` in a folder."""

    def __init__(self, path, folder):
        self.path, self.folder = path, folder

    def start(self, arguments, prefix=()):
        return subprocess.Popen([*prefix, self.path, *arguments.split()], cwd=self.folder, text=True, errors="replace",
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"GD_LOG": "info"})

    def result(self, arguments):
        """What a call that must succeed prints."""
        done = subprocess.run([self.path, *arguments.split(), "--json"], cwd=self.folder, text=True, capture_output=True)
        if done.returncode:
            raise Lost(f"gd {arguments}: {done.stderr.strip()}")
        return json.loads(done.stdout)


def saved(line):
    """The step of a checkpoint that a line of the log reports as saved."""
    found = re.search(r"saved .*checkpoint-(\d+)", line)
    return int(found[1]) if found else None


def wait_for_end(process):
    """The rest of what a program writes whose disk is gone. It ends by itself, with an error."""
    try:
        _, text = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Lost(f"{process.args} has not ended") from None
    if process.returncode not in (0, 1) or "panicked" in text:
        raise Lost(f"{process.args} ends with {process.returncode}: {text}")
    return text


class Cuts:
    """Cuts of one disk."""

    def __init__(self, path, disk, seed):
        self.disk, self.gd, self.random, self.reported = disk, Program(path, disk.root), random.Random(seed), None
        recipe = json.loads(RECIPE.read_text())
        recipe["train"] |= {"steps": 1_000_000, "batch": 1, "context": 16, "eval_every": 1_000_000, "save_every": 1}
        recipe["train"]["lr"]["shape"] = "constant"
        (disk.root / "c.json").write_text(json.dumps(recipe))
        (disk.root / "text.txt").write_text(SAMPLE.read_text()[:6000])
        disk.unmount()
        disk.mount()

    def training(self):
        """The arguments of the training, or of its resumption."""
        start = f"train --config c.json --data text.txt --seed 3 --out {RUN}"
        return start if self.reported is None else f"train --resume {RUN}"

    def cut_training(self, prefix=()):
        """Cuts the power at a random moment of the training."""
        process = self.gd.start(self.training(), prefix)
        wanted, lines = self.random.randrange(4), []
        limit = 0.3 if wanted == 0 else 0.03
        while wanted > 0 or self.reported is None:
            line = process.stderr.readline()
            if not line:
                raise Lost(f"the training has ended: {''.join(lines)}")
            lines.append(line)
            if (step := saved(line)) is not None:
                self.reported, wanted = step, wanted - 1
        time.sleep(self.random.uniform(0, limit))
        self.disk.cut()
        steps = [saved(line) for line in wait_for_end(process).splitlines()]
        self.reported = max([self.reported, *(step for step in steps if step is not None)])
        self.disk.restart()

    def check_training(self):
        """Checks the newest checkpoint, and that all readers take it."""
        folder = self.disk.root / RUN
        names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
        newest = max((int(name) for name in names if name.isdigit()), default=-1)
        if newest < self.reported:
            raise Lost(f"step {self.reported} was saved, {newest} is there")
        for arguments, key in [("eval {} --data text.txt", "loss"), ("generate {} --prompt It --max-tokens 8", "token_ids")]:
            own = self.gd.result(arguments.format(f"{RUN}/checkpoint-{newest}"))
            of_run = self.gd.result(arguments.format(RUN))
            if of_run[key] != own[key]:
                raise Lost(f"gd {arguments}: {of_run} and not that of step {newest}")
        step = self.gd.result(f"train --resume {RUN} --stop-after 1")["step"]
        if step != newest + 1:
            raise Lost(f"step {step} after a resumption from step {newest}")
        self.reported = step

    def cut_others(self, number):
        """Cuts the power while data are prepared and the model is converted, or right after that."""
        outputs = {"tokens": f"tokens/{number}", "model": f"models/{number}"}
        commands = {"tokens": f"data prepare --data text.txt --out {outputs['tokens']}",
                    "model": f"convert {RUN} --attention gd --k 4 --out {outputs['model']}"}
        is_done, finishes = {"tokens": False, "model": False}, self.random.random() < 0.5
        for kind, command in commands.items():
            process = self.gd.start(command)
            if kind == "tokens" or finishes:
                wait_for_end(process)
            else:
                time.sleep(self.random.uniform(0, 0.3))
            is_done[kind] = process.poll() == 0
        self.disk.cut()
        wait_for_end(process)
        self.disk.restart()
        checks = {"tokens": f"data inspect {outputs['tokens']}", "model": f"eval {outputs['model']} --data text.txt"}
        for kind, command in checks.items():
            if is_done[kind] or (self.disk.root / outputs[kind]).exists():
                self.gd.result(command)

    def check_equal(self, folder):
        """Compares with a run without cuts, on another disk."""
        folder.mkdir()
        for name in ["c.json", "text.txt"]:
            (folder / name).write_bytes((self.disk.root / name).read_bytes())
        Program(self.gd.path, folder).result("train --config c.json --data text.txt --seed 3 --save-every 1000000 "
                                             f"--stop-after {self.reported} --out run")
        runs = [self.disk.root / RUN, folder / "run"]
        for name in ["model.safetensors", "state.safetensors"]:
            contents = [(run / f"checkpoint-{self.reported}" / name).read_bytes() for run in runs]
            if contents[0] != contents[1]:
                raise Lost(f"{name} after {self.reported} steps is not that of a run without cuts")
        logs = [[json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()] for run in runs]
        steps = [[(line["step"], line["loss"]) for line in log if "event" not in line] for log in logs]
        if steps[0] != steps[1] or len(steps[0]) != self.reported:
            raise Lost(f"{len(steps[0])} steps in the log, {len(steps[1])} in that of a run without cuts, or other losses")

    def run(self, count):
        for number in range(count):
            if number % OTHER_COMMANDS_EVERY == OTHER_COMMANDS_EVERY - 1:
                self.cut_others(number)
            else:
                self.cut_training()
            self.check_training()


def loses_without_syncs(path, disk):
    """Whether a cut loses something that a training without syncs reported as saved."""
    cuts = Cuts(path, disk, 0)
    for _ in range(CONTROL_CUTS):
        try:
            cuts.cut_training(NO_SYNCS)
            cuts.check_training()
        except Lost as lost:
            print(f"{disk.filesystem}: without syncs a cut loses something: {str(lost).splitlines()[0][:200]}")
            return True
    return False


def log_cases(name, count):
    """As `gd_testing::log_cases`."""
    print(f"cases {name}: {count} run")
    if path := os.environ.get("GD_CASE_LOG"):
        with open(path, "a") as file:
            file.write(f"{name} {count}\n")


def check(path, filesystem, cuts, seed):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ["control", "disk"]:
            (folder / name).mkdir()
        try:
            control = Disk(filesystem, folder / "control")
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"power cuts of {filesystem} did not run: {error}", file=sys.stderr)
            log_cases(f"power-cut-{filesystem}", 0)
            return CANNOT_RUN
        is_lost = loses_without_syncs(path, control)
        control.unmount()
        if not is_lost:
            raise Lost(f"{CONTROL_CUTS} cuts of {filesystem} lose nothing without syncs: they show nothing")
        disk = Disk(filesystem, folder / "disk")
        try:
            training = Cuts(path, disk, seed)
            training.run(cuts)
            training.check_equal(folder / "whole")
        finally:
            disk.unmount()
        print(f"{filesystem}: {cuts} cuts of a run of {training.reported} steps, nothing lost")
        log_cases(f"power-cut-{filesystem}", cuts)
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gd", type=Path)
    parser.add_argument("--cuts", type=int, default=10, help="cuts of each file system")
    parser.add_argument("--filesystem", choices=MKFS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mounts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.mounts:
        # Mounts in a namespace of their own are gone when this program ends, however it ends.
        own = ["unshare", "--mount", sys.executable, __file__, "--mounts", *sys.argv[1:]]
        if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
            print("power cuts did not run: this machine or user has no mount namespaces", file=sys.stderr)
            sys.exit(CANNOT_RUN)
        os.execvp(own[0], own)
    codes = []
    for filesystem in args.filesystem or MKFS:
        try:
            codes.append(check(args.gd.resolve(), filesystem, args.cuts, args.seed))
        except Lost as lost:
            sys.exit(f"{filesystem}: {lost}")
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
