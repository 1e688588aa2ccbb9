"""Random traces for the test of the viewer, and the pages that the example program makes of them."""

import json
import math
import random
import re
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

EVIL = "</script><img src=x onerror=\"window.evil=1\"><script>window.evil=1</script>"
WORDS = ["the", " king", " of", " France", ",", " said", " a", " stranger", ".", " He", " could", " not", "\n", "\n\n",
         "\n  ", "\tindent", " ", "", "é", "漢", "字", "🙂", " שלום", EVIL, "—" * 70, " <b>", " &amp;", "x\ny"]
GENERATED, PROTECTED, REJECTED, LIFTED, RUNNER_UP = 1, 1, 2, 4, 8


def to_f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


class RandomTrace:
    """A random trace. `layers` lists (heads, rounds, threshold or None) of a layer that selects, with a fourth number if its
    heads have several picks, the number of heads of a softmax layer whose greatest weights are recorded, or the mechanism of a
    layer that is not recorded."""

    def __init__(self, seed, tokens, layers, first=0):
        self.random = random.Random(seed)
        self.first, self.end = first, first + tokens
        self.layers = [(n, kind[:3]) for n, kind in enumerate(layers) if isinstance(kind, tuple)]
        self.picks = {n: kind[3] for n, kind in enumerate(layers) if isinstance(kind, tuple) and len(kind) > 3}
        self.blends = [(n, head) for n, heads in enumerate(layers) if isinstance(heads, int) for head in range(heads)]
        self.header = {"format": "gd-trace", "version": 1, "gd": "0.1.0", "seed": 2**63 + 1, "device": "cpu",
                       "isa": "avx512", "precision": "native", "interventions": [EVIL], "sampling": None,
                       "input": "blake3:" + "0f" * 32, "prompt_tokens": tokens // 2,
                       "model": {"name": "small", "weights": "blake3:" + "a1" * 32, "config": "blake3:" + "b2" * 32,
                                 "tokenizer": "blake3:" + "c3" * 32},
                       "layers": [self.layer(*entry) for entry in enumerate(layers)]}
        self.texts = [self.random.choice(WORDS) for _ in range(tokens)]
        self.ids = [self.random.randrange(50_000) for _ in range(tokens)]
        self.cells = [(layer, head) for layer, (heads, _, _) in self.layers for head in range(heads)]
        self.rows = [[self.cell(p, *place) for place in self.cells] for p in range(first, self.end)]
        self.weights = [[self.blend(p) for _ in self.blends] for p in range(first, self.end)]

    @staticmethod
    def layer(n, kind):
        if isinstance(kind, str):
            return {"layer": n, "mechanism": kind, "selects": False}
        if isinstance(kind, int):
            return {"layer": n, "mechanism": "softmax", "selects": False, "heads": kind, "weights": 8}
        heads, rounds, threshold, *picks = kind
        bounds = None if threshold is None else [threshold] * heads
        layer = {"layer": n, "mechanism": "gd", "selects": True, "heads": heads, "rounds": rounds, "threshold": bounds}
        return layer | ({"picks": picks[0]} if picks else {})

    def blend(self, p):
        """The greatest weights of a softmax head, in descending order."""
        keys = self.random.sample(range(p + 1), min(p + 1, 8))
        parts = sorted((self.random.random() + 0.01 for _ in keys), reverse=True)
        return [(key, to_f32(part / sum(parts))) for key, part in zip(keys, parts)]

    def cell(self, p, layer, head):
        rng = self.random
        _, rounds, threshold = dict(self.layers)[layer]
        keys = rng.sample(range(p + 1), min(p + 1, rng.randrange(1, 6)))
        if head == 0 and p:
            keys = [p - 1] + [k for k in keys if k != p - 1]
        candidates, energy = [], 0.0
        for n, key in enumerate(keys):
            energy += rng.random() + 0.01
            flags = PROTECTED * (rng.random() < 0.2)
            flags |= REJECTED * (threshold is not None and energy > threshold)
            lifted = LIFTED * (n == 1 and rng.random() < 0.2)
            runner_up = RUNNER_UP * (n == len(keys) - 1 > 1 and not flags and not lifted)
            candidates.append({"key": key, "flags": flags | lifted | runner_up, "energy": to_f32(energy),
                               "lifted": to_f32(energy - 0.005)})
        admitted = [c for c in candidates if not c["flags"] & REJECTED]
        if not admitted or rng.random() < 0.05:
            admitted = []
        margin = to_f32(admitted[1]["energy"] - admitted[0]["energy"]) if len(admitted) > 1 else math.inf
        picks = self.picks.get(layer, 1)
        later = [admitted[n]["key"] if n < len(admitted) else -1 for n in range(1, rounds + picks - 1)]
        weights = [to_f32(rng.random()) if key >= 0 else 0.0 for key in later] if picks > 1 else []
        value = rng.random()
        selected, energy = (admitted[0]["key"], admitted[0]["energy"]) if admitted else (-1, math.inf)
        return {"selected": selected, "energy": energy, "margin": margin,
                "coherence": rng.random() if rng.random() < 0.8 else math.nan,
                "gate": 0.5 if head == 1 else 1.0,
                "value": to_f32(value), "average": to_f32((1 - value) * rng.random()), "later": later,
                "weights": weights, "candidates": candidates}

    def change(self, share, seed):
        """Changes the selection in a share of the cells to a random candidate."""
        rng = random.Random(seed)
        for row in self.rows:
            for cell in row:
                if rng.random() < share:
                    cell["selected"] = rng.choice([c["key"] for c in cell["candidates"]])

    def records(self):
        out = bytearray()
        for n, row in enumerate(self.rows):
            text = self.texts[n].encode()
            flags = GENERATED * (2 * n >= len(self.rows))
            body = bytearray(struct.pack("<IIIH", self.first + n, self.ids[n], flags, len(text)) + text)
            for c in row:
                body += struct.pack("<iffffff", c["selected"], c["energy"], c["margin"], c["coherence"], c["gate"],
                                    c["value"], c["average"])
                if c["weights"]:
                    body += b"".join(struct.pack("<if", *pair) for pair in zip(c["later"], c["weights"]))
                else:
                    body += struct.pack(f"<{len(c['later'])}i", *c["later"])
                body += bytes([len(c["candidates"])])
                for k in c["candidates"]:
                    body += struct.pack("<iBf", k["key"], k["flags"], k["energy"])
                    if k["flags"] & LIFTED:
                        body += struct.pack("<f", k["lifted"])
            for weights in self.weights[n]:
                body += bytes([len(weights)]) + b"".join(struct.pack("<if", *pair) for pair in weights)
            out += struct.pack("<I", len(body)) + body
        return bytes(out)

    def row(self, p):
        return self.rows[p - self.first]

    def reads(self, p, layer):
        """All positions that a layer reads at position p, in all rounds."""
        if p < self.first:
            return []
        cells = [c for (at, _), c in zip(self.cells, self.row(p)) if at == layer]
        return [key for c in cells for key in [c["selected"], *c["later"]] if key >= 0]

    def path_counts(self, start, goals, depth):
        """The number of paths from `start` through the last `depth` selecting layers to each goal, and in total."""
        names = [layer for layer, _ in self.layers][len(self.layers) - depth:]

        @cache
        def count(level, at, goal):
            if level < 0:
                return int(goal is None or at == goal)
            return sum(count(level - 1, key, goal) for key in [at, *self.reads(at, names[level])])

        sys.setrecursionlimit(10_000)
        return {goal: count(depth - 1, start, goal) for goal in goals}, count(depth - 1, start, None)

    def reached(self, start, depth):
        positions = {start}
        for layer, _ in self.layers[::-1][:depth]:
            positions |= {key for p in positions for key in self.reads(p, layer)}
        return positions


class Build:
    """Creates pages with the example program."""

    def __init__(self, target, folder):
        self.program, self.folder, self.count = Path(target) / "examples/viewer", Path(folder), 0
        if not self.program.exists():
            sys.exit(f"{self.program} is missing: cargo build --release -p gd-cli --example viewer")

    def page(self, *traces, cut=0):
        self.count += 1
        base, args = self.folder / f"page{self.count}", []
        for n, (name, trace) in enumerate(traces):
            header, records = base.with_suffix(f".{n}.json"), base.with_suffix(f".{n}.bin")
            header.write_text(json.dumps(trace.header))
            data = trace.records()
            records.write_bytes(data if not cut else cut_inside(data, cut))
            args += [name, header, records]
        path = base.with_suffix(".html")
        subprocess.run([self.program, path, *args], check=True)
        return path


def cut_inside(data, count):
    """The first record without its last `count` bytes, with a correct length."""
    (length,) = struct.unpack_from("<I", data)
    return struct.pack("<I", length - count) + data[4:4 + length - count]


def prose(seed, change=0.0, tokens=420):
    trace = RandomTrace(seed, tokens, [(4, 1, None), (4, 1, 2.5), "softmax", (4, 1, 2.5)])
    text = (Path(__file__).resolve().parents[2] / "models/text/sample.txt").read_text()[:10000]
    trace.texts = re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)[:tokens]
    if change:
        trace.change(change, seed)
    return trace
