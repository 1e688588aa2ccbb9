#!/usr/bin/env python3
"""Tests reports and pages of plots in headless Chromium: their widths, color schemes, and the values under the pointer.

    python3 -m venv venv && venv/bin/pip install websockets
    venv/bin/python scripts/ci/check_report.py target/debug/gd RUN [--page PAGE.html] [--shots DIR]

RUN is the folder of a run. `--page` names further pages, such as that of `gd compare`, `gd task` or `gd map`, and can be repeated.
`--shots` writes pictures. Needs Chromium (Debian: chromium), in $CHROMIUM or on the path. The exit code is 1 if a check fails.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import checks
from checks import check
from viewer_browser import Browser, find_chromium

# Windows of a computer and of a phone.
SIZES = [(1000, 900), (400, 800)]


def brightness(tab, selector):
    """The brightness of the background of an element, from 0 to 255."""
    color = tab.js(f"getComputedStyle(document.querySelector({json.dumps(selector)})).backgroundColor")
    return sum(map(float, color.strip("rgba()").split(",")[:3])) / 3


def forms(browser, page, shots):
    """Every page fits its window, follows the color scheme, and asks for nothing elsewhere."""
    for width, height in SIZES:
        for dark in [False, True]:
            tab = browser.open(page, ready="document.querySelector('svg')", width=width, height=height, dark=dark)
            wide = tab.js("document.documentElement.scrollWidth")
            check(wide <= width, f"{page.name} is {wide} wide in a window of {width}")
            check((brightness(tab, "body") < 60) == dark, page.name, dark, brightness(tab, "body"))
            check(len(tab.requests) == 1 and not tab.errors, page.name, tab.requests, tab.errors)
            # The letters of a chart have 11 units.
            size = tab.js("Math.min(...[...document.querySelectorAll('svg')].filter((svg) => svg.clientWidth > 50)"
                          ".map((svg) => 11 * svg.clientWidth / svg.viewBox.baseVal.width))")
            check(size >= 9, f"{page.name}: letters of {size} pixels in a window of {width}")
            if shots:
                tab.shot(shots / f"{page.stem}-{width}-{'dark' if dark else 'light'}.png")


def values(browser, page, run):
    """The line below a chart has the values of the log at the step under the pointer, or that of the arrow keys."""
    log = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in log if "event" not in line}
    tab = browser.open(page, ready="document.querySelector('svg[data-chart]')", width=1000, height=900)
    tab.js("window.chart = [...document.querySelectorAll('figure')]"
           ".find((figure) => figure.querySelector('h3').textContent === 'learning rate')")

    def shown():
        text = tab.js("chart.querySelector('.readout').textContent")
        step, value = text.removeprefix("Step ").strip().split(":")
        step, value = int(step.replace(",", "")), float(value.split()[-1].replace(",", ""))
        check(abs(value - rates[step]) <= 1e-4 * abs(rates[step]), text, rates[step])
        return step

    tab.js("chart.scrollIntoView()")
    x, y, width, height = tab.js("(({ x, y, width, height }) => [x, y, width, height])"
                                 "(chart.querySelector('svg').getBoundingClientRect())")
    steps = []
    for share in [0.2, 0.5, 0.9]:
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + share * width, y=y + height / 2)
        steps.append(shown())
    check(steps == sorted(set(steps)), steps)
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    check(tab.js("chart.querySelector('.readout').textContent") == "")
    tab.js("chart.querySelector('svg').focus()")
    before = shown()
    tab.press("ArrowLeft")
    check(shown() < before, before)
    # Charts are named in words, and what a statistic says is below it.
    titles = tab.js("[...document.querySelectorAll('h3')].map((title) => title.firstChild.textContent.trim())")
    check(not any("/" in title or "_" in title for title in titles) and "training loss" in titles, titles)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gd")
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path, action="append", default=[])
    parser.add_argument("--shots", type=Path)
    args = parser.parse_args()
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser(find_chromium()) as browser:
        one, two, plot = (Path(folder) / f"{name}.html" for name in ("report", "two", "plot"))
        for command in (["report", args.run, "--out", one], ["report", args.run, args.run, "--out", two],
                        ["plot", args.run, args.run, "--y", "loss,valid_loss,lr", "--out", plot]):
            subprocess.run([args.gd, *command], check=True, stdout=subprocess.DEVNULL)
        for page in [one, two, plot, *args.page]:
            forms(browser, page, args.shots)
        values(browser, one, args.run)
    print(f"{checks.count} checks of reports and plots")


if __name__ == "__main__":
    main()
