#!/usr/bin/env python3
"""Tests the page of the trace viewer in headless Chromium: presses keys and compares the page with the records.

    python3 -m venv venv && venv/bin/pip install websockets
    cargo build --release -p gd-cli --example viewer
    venv/bin/python scripts/ci/check_viewer.py [--target target/release] [--shots DIR]

The traces are random, with a fixed seed. Needs Chromium (Debian: chromium), in $CHROMIUM or on the path.
The expected path counts are computed here with another algorithm. Prints the number of checks of each part and the time
of a frame after a key. The exit code is 1 if a check fails, or if Chromium or the example is missing.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import tempfile
from pathlib import Path

import checks
from checks import check
from viewer_browser import Browser, find_chromium
from viewer_traces import EVIL, LIFTED, PROTECTED, REJECTED, RUNNER_UP, Build, RandomTrace, prose

# Number of reads that are shown at first.
STRONGEST = 5


def same(actual, expected, *what):
    check(actual == expected, *what, f"the page has {actual!r}, expected {expected!r}")


def number(text):
    return math.inf if text == "∞" else float(text.replace("−", "-"))


def near(text, x):
    """Whether a formatted number is `x` with four significant digits."""
    value = number(text)
    return value == x or abs(value - x) <= 6e-4 * abs(x)


def matrix(tab, trace, p, view=1):
    cells = tab.js(f"""[...document.querySelectorAll('.trace:nth-of-type({view}) .matrix [data-cell]')].map((c) =>
        [c.dataset.cell, c.textContent, c.getAttribute('aria-label'), c.className.includes('abstained')])""")
    names = [f"{layer}.{head}" for layer, head in trace.cells + trace.blends]
    same(sorted(c[0] for c in cells), sorted(names), "the heads in the matrix")
    if trace.cells:
        same(cells[0][0], names[0], "the first head in the matrix")
    cells.sort(key=lambda c: names.index(c[0]))
    for (name, text, label, _), weights in zip(cells[len(trace.cells):], trace.weights[p - trace.first]):
        key, weight = weights[0]
        same(text, f"{p - key}{100 * weight:.0f} %", f"position {p} softmax head {name}")
        check(f"blends all keys; the {len(weights)} greatest weights" in label, label)
    for (name, text, label, abstained), c in zip(cells, trace.row(p)):
        expected = c["selected"] < 0
        same(abstained, expected, f"position {p} head {name}: whether it abstained")
        if expected:
            same((text, "abstained" in label), ("∅", True), f"position {p} head {name}")
            continue
        no_runner_up = math.isinf(c["margin"])
        same(text, f"{p - c['selected']}{'∞' if no_runner_up else ''}", f"position {p} head {name}")
        check(f"reads position {c['selected']} " in label, label)
        same("gate ρ 0.5" in label, c["gate"] == 0.5, f"the gate of {name} in {label}")
        shown = re.search(r"margin (\S+)|(no runner-up)", label)
        check(bool(shown[2]) if no_runner_up else near(shown[1].rstrip(";,"), c["margin"]), label, c["margin"])


def paths(tab, trace, p, sample=None):
    rows = tab.js("""[...document.querySelectorAll('.paths tr[data-layer]')].map((r) => [r.dataset.layer,
        r.querySelector('.positions').textContent, r.querySelector('.paths').textContent])""")
    plain = lambda text: int(text.replace("\u202f", ""))
    same([row[0] for row in rows], [str(layer) for layer, _ in trace.layers[::-1]], "layers of the paths")
    for depth, (layer, positions, total) in enumerate(rows, 1):
        expected = trace.reached(p, depth)
        same(plain(positions), len(expected), f"positions reached from {p} down to layer {layer}")
        same(plain(total), trace.path_counts(p, [], depth)[1], f"paths from {p} down to layer {layer}")
    shown = tab.js("""[...document.querySelectorAll('[data-paths]')].map((t) =>
        [+t.dataset.position, t.dataset.paths])""")
    check(len(shown) > 30, "only", len(shown), "tokens are in view")
    checked = shown if sample is None else random.Random(p).sample(shown, sample)
    expected, _ = trace.path_counts(p, {position for position, _ in checked}, len(trace.layers))
    for position, count in checked:
        same(int(count), expected[position], f"paths from {p} to {position}")


def candidates(tab, trace, p, c):
    layer, head = trace.cells[c]
    cell, threshold = trace.row(p)[c], dict(trace.layers)[layer][2]
    rows = tab.js("""[...document.querySelectorAll('.candidates tr[data-key]')].map((r) =>
        [+r.dataset.key, ...[...r.children].slice(1).map((d) => d.textContent)])""")
    same([row[0] for row in rows], [k["key"] for k in cell["candidates"]], f"candidates of {layer}.{head} at {p}")
    for (key, energy, lifted, protected, outcome), k in zip(rows, cell["candidates"]):
        check(near(energy, k["energy"]), f"energy of {key}: {energy}, {k['energy']} expected")
        check(near(lifted, k["lifted"]) if k["flags"] & LIFTED else lifted == "", f"lift of {key}: {lifted}")
        same(protected == "yes", bool(k["flags"] & PROTECTED), f"protection of {key}")
        later = "pick" if cell["weights"] else "round"
        word = ("selected" if key == cell["selected"] else later if key in cell["later"]
                else "threshold" if k["flags"] & REJECTED else "runner-up" if k["flags"] & RUNNER_UP else "not least")
        check(word in outcome and (word != "threshold" or f"> {threshold:g}" in outcome),
              f"outcome of {key}: {outcome}, {word}")
    reads = labels(tab)
    expected = [key for key in [cell["selected"], *cell["later"]] if key >= 0]
    check(len(reads) <= len(expected) and all(f"layer {layer} head {head} " in r for r in reads), reads, expected)


def labels(tab):
    """The descriptions of the arrows."""
    return tab.js("[...document.querySelectorAll('.arrow')].map((a) => a.getAttribute('aria-label'))")


def clearest(tab, trace, p):
    """The arrows at first are those of the largest margins, as far as they are in view."""
    ranked = [(-c["margin"] if math.isfinite(c["margin"]) else 1, n) for n, c in enumerate(trace.row(p))
              if c["selected"] >= 0]
    names = ["layer {} head {} ".format(*trace.cells[n]) for _, n in sorted(ranked)[:STRONGEST]]
    shown = labels(tab)
    check(len(shown) <= len(names) and all(any(s.startswith(name) for name in names) for s in shown), shown, names)
    status = tab.js("document.querySelector('.status').textContent")
    check(f"the {len(names)} clearest reads" in status, status)


def totals(tab, trace):
    rows = tab.js("""[...document.querySelectorAll('.totals tr[data-cell]')].map((r) =>
        [...r.children].map((d) => d.textContent))""")
    for c, (name, abstains, margin, zero) in enumerate(rows):
        column = [row[c] for row in trace.rows]
        selecting = [cell for cell in column if cell["selected"] >= 0]
        margins = [cell["margin"] for cell in selecting if math.isfinite(cell["margin"])]
        same(abstains, f"{100 * (1 - len(selecting) / len(column)):.1f} %", f"abstention of {name}")
        check(near(margin, statistics.fmean(margins)), f"mean margin of {name}: {margin}")
        share = sum(cell["selected"] == 0 for cell in selecting) / len(selecting)
        same(zero, f"{100 * share:.1f} %", f"first token, {name}")


def chosen(tab, view=1):
    return tab.js(f"+document.querySelector('.trace:nth-of-type({view}) .token.chosen')?.dataset.position")


def one_trace(browser, build):
    trace = RandomTrace(1, 300, [(4, 1, None), "softmax", (3, 3, 2.0), (4, 1, 2.5)])
    tab = browser.open(build.page((f"{EVIL} small", trace)))
    same(chosen(tab), 299, "the token chosen at first")
    totals(tab, trace)
    hashes = tab.js("document.querySelector('.proof dl').textContent")
    for text in [*trace.header["model"].values()][1:] + [trace.header["input"], str(2**63 + 1), EVIL, "not chained"]:
        check(text in hashes, f"{text} is not among the hashes: {hashes}")
    blends = tab.js("document.querySelector('.blends').textContent")
    same(blends, "Layer 1 (softmax) blends: no single source.", "the layer that does not select")
    displays = tab.js("[...new Set([...document.querySelectorAll('td')].map((d) => getComputedStyle(d).display))]")
    same(displays, ["table-cell"], "the layout of the cells of tables")
    clearest(tab, trace, 299)
    rng, p = random.Random(2), 299
    for step in range(40):
        key = rng.choice(["j", "k", "ArrowLeft", "ArrowRight", "search", "Home", "End", "k", "k"])
        if key == "search":
            p = rng.randrange(300)
            tab.press("/")
            tab.type(str(p))
            tab.press("Enter")
            tab.press("Escape")
        else:
            tab.press(key)
            by = {"j": 1, "ArrowRight": 1, "k": -1, "ArrowLeft": -1, "Home": -300, "End": 300}[key]
            p = min(299, max(0, p + by))
        tab.settle()
        same(chosen(tab), p, f"the token chosen after key {step}, {key}")
        matrix(tab, trace, p)
        clearest(tab, trace, p)
        if step % 4 == 0:
            paths(tab, trace, p)
    # Up reverses Down, and Page Down moves further than one line.
    tab.press("/")
    tab.type("150")
    tab.press("Enter")
    tab.press("Escape")
    tab.settle()
    for down, up in [("ArrowDown", "ArrowUp"), ("PageDown", "PageUp")]:
        line = "document.querySelector('.token.chosen').parentElement.offsetTop"
        before = tab.js(line)
        tab.press(down)
        tab.settle()
        check(tab.js(line) > before, f"{down} does not lead down")
        tab.press(up)
        tab.settle()
        same(tab.js(line), before, f"the line after {down} and {up}")
    # The matrix by keys: one head alone, its candidates, its key; then all again.
    tab.press("/")
    tab.type("199")
    tab.press("Enter")
    tab.press("Escape")
    tab.press("m")
    for key, at in [("", 0), ("ArrowRight", 1), ("ArrowDown", 5), ("ArrowRight", 6), ("ArrowDown", 9), ("Home", 7)]:
        if key:
            tab.press(key)
        same(tab.js("document.activeElement.dataset.cell"), "{}.{}".format(*trace.cells[at]), "focus in the matrix")
        tab.press("Enter")
        tab.settle()
        same(tab.js("document.querySelector('.matrix [aria-selected=true]')?.dataset.cell"),
             "{}.{}".format(*trace.cells[at]), "the head alone")
        candidates(tab, trace, 199, at)
    followed = trace.row(199)[7]["selected"]
    tab.press("f")
    tab.settle()
    same(chosen(tab), followed if followed >= 0 else 199, "the key of the head alone")
    tab.press("b")
    tab.press("Escape")
    tab.settle()
    same(chosen(tab), 199, "the way back")
    same(tab.js("document.querySelectorAll('.matrix [aria-selected=true]').length"), 0, "no head alone")
    # All heads of a layer, by the key and by the number of the layer.
    for layer in [3, 2]:
        tab.press("l") if layer == 3 else tab.js("document.querySelector('.layer[data-layer=\"2\"]').click()")
        tab.settle()
        shown, expected = labels(tab), trace.reads(199, layer)
        check(0 < len(shown) <= len(expected) and all(s.startswith(f"layer {layer} ") for s in shown), shown, expected)
        same(tab.js("document.querySelector('.which').value"), f"layer {layer}", "the choice of the arrows")
    tab.press("a")
    tab.settle()
    # The arrows of all heads: one for each read that is not out of view on the side of the token itself.
    expected = sum(len(trace.reads(199, layer)) for layer, _ in trace.layers)
    drawn = tab.js("document.querySelectorAll('.arrow').length")
    check(0 < drawn <= expected, f"{drawn} arrows for {expected} reads")
    tab.press("r")
    status = tab.js("document.querySelector('.status').textContent")
    same(status, tab.js("document.activeElement.getAttribute('aria-label')"), "the status of an arrow with the focus")
    check(re.search(r"layer \d head \d reads position \d+ “.*” ?.*back", status, re.S) is not None, status)
    tab.press("t")
    same(tab.js("document.activeElement.className"), "scroll", "the focus after t")
    tab.js("document.querySelector('.shares').open = true")
    tab.settle()
    texts = tab.js("[...document.querySelectorAll('.shares tbody tr')].map((r) => r.children[2].textContent)")
    same(texts, [f"{100 * c['value']:.1f} %" for c in trace.row(199)], "shares of the selected value")
    # A click chooses a token. Text of the trace is shown as text and does not become markup.
    tab.press("Home")
    tab.settle()
    spot = tab.js("(({ x, y, width }) => [x + width / 2, y + 5])(document.querySelector("
                  "'[data-position=\"9\"]').getBoundingClientRect())")
    tab.click(*spot)
    tab.settle()
    same(chosen(tab), 9, "the token chosen by a click")
    evil = trace.texts.index(EVIL)
    tab.press("/")
    tab.type(str(evil))
    tab.press("Enter")
    tab.settle()
    shown = tab.js(f"[...document.querySelectorAll('[data-position=\"{evil}\"]')].map((t) => t.textContent).join('')")
    same(shown, EVIL, "a token that looks like markup")
    same(tab.js("[document.images.length, typeof window.evil]"), [0, "undefined"], "markup of a token in the page")
    clean(tab)
    # The policy forbids other scripts and requests.
    tab.js("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.evil = 1' }))")
    same(tab.js("typeof window.evil"), "undefined", "a script put into the page")
    refused = tab.js("fetch('http://127.0.0.1:9/').then(() => 'fetched', () => 'refused')")
    same(refused, "refused", "a fetch from the page")
    check(any("Content Security Policy" in error for error in tab.errors), "the policy did not forbid it:", tab.errors)
    return trace


def blends(browser, build):
    """Softmax heads show their greatest weights as a blend; heads that select come first."""
    trace = RandomTrace(11, 200, ["softmax", 4, (4, 1, None), 3, (2, 1, 2.0)])
    tab = browser.open(build.page(("blends", trace)))
    clearest(tab, trace, 199)
    for p in [199, 198, 120]:
        tab.press("/")
        tab.type(str(p))
        tab.press("Enter")
        tab.press("Escape")
        tab.settle()
        matrix(tab, trace, p)
        for name, weights in zip(trace.blends, trace.weights[p]):
            tab.js("document.querySelector('[data-cell=\"{}.{}\"]').click()".format(*name))
            tab.settle()
            rows = tab.js("""[...document.querySelectorAll('.candidates tr[data-key]')].map((r) =>
                [+r.dataset.key, r.children[1].textContent])""")
            same(rows, [[key, f"{100 * weight:.1f} %"] for key, weight in weights], f"the weights of {name} at {p}")
            shown = labels(tab)
            check(len(shown) <= 8 and all("with weight" in s for s in shown), shown)
    clean(tab)
    # A trace of a model without selection.
    only = RandomTrace(12, 60, [3, 3])
    tab = browser.open(build.page(("only", only)))
    matrix(tab, only, 59)
    check(len(labels(tab)) > 0, "no arrow of a blend")
    clean(tab)


def picks(browser, build):
    """A head that reads several keys of one scan shows the weight of each."""
    trace = RandomTrace(15, 120, [(3, 1, None, 3), (2, 1, 2.0), (2, 1, 2.5, 2)])
    tab = browser.open(build.page(("picks", trace)))
    read = 0
    for p in [119, 118, 60, 3, 0]:
        tab.press("/")
        tab.type(str(p))
        tab.press("Enter")
        tab.press("Escape")
        tab.settle()
        for at, (name, c) in enumerate(zip(trace.cells, trace.row(p))):
            if not (weights := [*zip(c["later"], c["weights"])]):
                continue
            tab.js("document.querySelector('[data-cell=\"{}.{}\"]').click()".format(*name))
            tab.settle()
            rows = dict(tab.js("""[...document.querySelectorAll('.candidates tr[data-key]')].map((r) =>
                [+r.dataset.key, r.lastElementChild.textContent])"""))
            expected = [(c["selected"], "selected", c["gate"])] if c["selected"] >= 0 else []
            expected += [(key, f"pick {n}", weight) for n, (key, weight) in enumerate(weights, 2) if key >= 0]
            for key, word, weight in expected:
                label, value = rows[key].split(", weight ")
                same(label, word, f"the outcome of {key} at {p} in {name}")
                check(near(value, weight), f"weight of {key} at {p} in {name}: {value}, {weight}")
            # The arrows of the further picks have their weights.
            for key, word, weight in expected[1:]:
                arrows = [a for a in labels(tab) if f"reads position {key} " in a and f" in {word}, weight " in a]
                check(len(arrows) <= 1 and all(near(a.split("weight ")[1].split(",")[0], weight) for a in arrows), arrows)
                read += len(arrows)
            candidates(tab, trace, p, at)
    check(read > 10, f"{read} arrows of further picks")
    clean(tab)


def short_text(browser, build):
    """The arrows of a text of a few lines cross no word, and the pane is as tall as the text."""
    for width in [1280, 400]:
        trace = prose(13, tokens=60)
        tab = browser.open(build.page(("short", trace)), width=width)
        for step in range(12):
            tab.press("k" if step % 2 else "ArrowUp")
            if step % 3 == 0:
                tab.press("a")
            tab.settle()
            crossed = tab.js("""(() => {
                const boxes = [...document.querySelectorAll('.token')].map((t) => [t, t.getBoundingClientRect()]);
                const origin = document.querySelector('.arrows').getBoundingClientRect(), crossed = [];
                for (const path of document.querySelectorAll('.arrow .line')) {
                    const length = path.getTotalLength();
                    // The ends touch the words that they belong to.
                    for (let at = 4; at < length - 4; at += 3) {
                        const { x, y } = path.getPointAtLength(at), px = x + origin.x, py = y + origin.y;
                        const inside = (b) => px > b.left && px < b.right && py > b.top + 2 && py < b.bottom - 2;
                        const hit = boxes.find((entry) => inside(entry[1])), label = path.parentNode.ariaLabel;
                        if (hit) crossed.push(`${label} crosses ${hit[0].textContent}`);
                    }
                }
                return crossed;
            })()""")
            same(sorted(set(crossed)), [], f"words that arrows cross at a width of {width}")
        pane, text = tab.js("['.pane', '.lines'].map((name) => document.querySelector(name).clientHeight)")
        check(pane <= text + 2, f"the pane is {pane} tall, its text {text}")
        clean(tab)


def many_heads(browser, build):
    """All columns of the matrix are in its panel."""
    for heads, width in [(9, 1280), (9, 400), (32, 1280), (32, 400)]:
        trace = RandomTrace(14, 30, ["softmax"] * 3 + [(heads, 1, None)] * 2)
        tab = browser.open(build.page(("wide", trace)), width=width)
        inner, table = tab.js("(({ parentElement, scrollWidth }) => [parentElement.clientWidth, scrollWidth])"
                              "(document.querySelector('.matrix'))")
        check(table <= inner, f"the matrix of {heads} heads is {table} wide in {inner}")
        same(tab.js("document.querySelector('.matrix tbody th').textContent"), "3", "the first layer of the matrix")
        same(tab.js("document.querySelector('.blends').textContent"),
             "Layers 0–2 (softmax) blend: no single source.", "the layers that are not recorded")


def clean(tab):
    same(tab.errors, [], "errors on the console")
    same([url for url in tab.requests if not url.startswith(("file:", "data:"))], [], "requests")
    same(len([url for url in tab.requests if url.startswith("file:")]), 1, "files read")


def deep(browser, build):
    """Path counts above 2^53."""
    trace = RandomTrace(3, 150, [(9, 1, None)] * 30)
    tab = browser.open(build.page(("deep", trace)))
    tab.wait("document.querySelector('.paths .paths').textContent !== '…'")
    paths(tab, trace, 149, sample=12)
    total = trace.path_counts(149, [], 30)[1]
    check(total > 2**53, f"{total} paths do not need more than a double")
    clean(tab)


def late_start(browser, build):
    """A trace that starts after the beginning of its text, so that some keys have no record."""
    trace = RandomTrace(4, 80, [(3, 1, None), (2, 2, 2.0)], first=40)
    tab = browser.open(build.page(("late", trace)))
    for _ in range(5):
        matrix(tab, trace, chosen(tab))
        paths(tab, trace, chosen(tab))
        tab.press("k")
        tab.settle()
    clean(tab)


def two_traces(browser, build):
    shape = [(4, 1, None), (3, 1, 2.5)]
    left, right = RandomTrace(5, 250, shape), RandomTrace(5, 250, shape)
    right.change(0.02, 6)
    tab = browser.open(build.page(("left", left), ("right", right)))
    apart = [[a["selected"] != b["selected"] for a, b in zip(*rows)] for rows in zip(left.rows, right.rows)]
    count = sum(map(sum, apart))
    check(10 < count < 100, count, "differences are no test")
    same(tab.js("document.querySelector('#differences').textContent"),
         f"{count} of 1\u202f750 selections differ, 0 tokens", "the differences of the two")
    tab.press("Home")
    visited, at = [], -1
    for _ in range(12):
        tab.press("n")
        tab.settle()
        at = next(p for p in range(max(at, 0) + 1, 250) if any(apart[p]))
        visited.append((chosen(tab), chosen(tab, 2)))
        same(visited[-1], (at, at), "the next difference, in both")
        for view, trace in [(1, left), (2, right)]:
            matrix(tab, trace, at, view)
            marks = tab.js(f"[...document.querySelectorAll('.trace:nth-of-type({view}) .matrix [data-cell]')]"
                           ".map((c) => c.className.includes('differs'))")
            same(marks, apart[at], f"the marks of differences at {at}")
    tab.press("p")
    tab.settle()
    same(chosen(tab, 2), visited[-2][0], "the previous difference")
    tab.press("u")
    tab.press("End")
    tab.settle()
    same((chosen(tab), chosen(tab, 2)), (249, visited[-2][0]), "the choice once unlinked")
    tab.press("u")
    tab.settle()
    same(chosen(tab, 2), 249, "the choice once linked again")
    clean(tab)


def broken(browser, build):
    page = build.page(("cut", RandomTrace(7, 3, [(2, 1, None)])), cut=5)
    tab = browser.open(page, ready="document.querySelector('[role=alert]')")
    text = tab.js("document.querySelector('[role=alert]').textContent")
    check("cannot be shown" in text and "record 0" in text, text)


def speed(browser, build):
    trace = RandomTrace(8, 10_000, [(6, 1, None)] * 6)
    tab = browser.open(build.page(("long", trace)))
    opened = tab.js("performance.now()")
    tab.send("Performance.enable", timeDomain="threadTicks")
    busy = lambda: {m["name"]: m["value"] for m in tab.send("Performance.getMetrics")["metrics"]}["TaskDuration"]
    before = busy()
    times = tab.js(f"""(async () => {{
        const times = [], keys = {json.dumps(["k", "ArrowUp", "k", "PageUp", "Home", "j", "End", "ArrowLeft"] * 10)};
        for (const key of keys) {{
            const start = performance.now();
            document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{ key, bubbles: true }}));
            // The page draws in a frame callback. A message that is sent there arrives after layout and paint.
            await new Promise((done) => requestAnimationFrame(() => {{
                const channel = new MessageChannel();
                channel.port1.onmessage = done;
                channel.port2.postMessage(0);
            }}));
            times.push(performance.now() - start);
        }}
        return times;
    }})()""")
    middle, worst, work = statistics.median(times), max(times), 1000 * (busy() - before) / len(times)
    print(f"10,000 tokens, 6 x 6 heads: open after {opened:.0f} ms; {len(times)} keys, a frame after "
          f"{middle:.1f} ms (median), {worst:.1f} ms (longest), {work:.1f} ms of the page's thread a key")
    drawn = tab.js("document.querySelectorAll('.token').length")
    check(drawn < 3000, f"{drawn} tokens are in the document")
    matrix(tab, trace, chosen(tab))
    paths(tab, trace, chosen(tab), sample=4)
    clean(tab)


def layouts(browser, build, shots):
    """Checks that no page is wider than its window, and takes screenshots."""
    one = build.page(("out/small.trace", prose(9)))
    two = build.page(("a.trace", prose(9)), ("b.trace", prose(9, change=0.05)))
    for name, page in [("one", one), ("two", two)]:
        for width, height in [(1280, 900), (360, 780)]:
            for dark in [False, True]:
                tab = browser.open(page, width=width, height=height, dark=dark)
                for key in ["k", "k", "ArrowUp", "m", "ArrowRight", "Enter", "a", "t"]:
                    tab.press(key)
                tab.settle()
                wide = tab.js("document.documentElement.scrollWidth")
                check(wide <= width, f"the page is {wide} wide in a window of {width}")
                if not shots:
                    continue
                stem = f"{name}-{width}-{'dark' if dark else 'light'}"
                tab.shot(shots / f"{stem}.png")
                for key in ["n", "m", "ArrowDown", "Enter"]:
                    tab.press(key)
                tab.js("document.querySelector('.shares').open = true")
                tab.js("document.querySelector('.panels').scrollIntoView()")
                tab.settle()
                tab.shot(shots / f"{stem}-panels.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default=os.environ.get("CARGO_TARGET_DIR", "target") + "/release")
    parser.add_argument("--shots", type=Path)
    args = parser.parse_args()
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser(find_chromium()) as browser:
        build = Build(args.target, folder)
        parts = {"one trace": one_trace, "blends": blends, "several picks": picks,
                 "a short text": short_text, "many heads": many_heads,
                 "counts above 2^53": deep, "a trace that starts late": late_start,
                 "two traces": two_traces, "a broken trace": broken, "a long trace": speed,
                 "widths": lambda browser, build: layouts(browser, build, args.shots)}
        for name, part in parts.items():
            before = checks.count
            part(browser, build)
            print(f"{name}: {checks.count - before} checks")
    print(f"viewer: {checks.count} checks passed")
    checks.log_cases("viewer")


if __name__ == "__main__":
    main()
