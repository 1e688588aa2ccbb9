#!/usr/bin/env python3
"""Makes crates/gd-model/tests/fixtures/parquet: small files as pyarrow writes them, and what they hold as JSON lines.

    python3 -m venv venv && venv/bin/pip install pyarrow
    venv/bin/python scripts/golden/parquet_files.py

Each file has another compression. The columns beside the text have the types that data sets have: numbers, dates, bytes
that are no UTF-8, lists of structs and empty values.
"""

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(__file__).resolve().parents[2] / "crates/gd-model/tests/fixtures/parquet"
OUT.mkdir(exist_ok=True)

texts = ["one", "two é", 'three "quoted"\n\\', "", None, "six\t六"] * 3
pq.write_table(
    pa.table({
        "id": pa.array(range(len(texts)), pa.int64()),
        "text": texts,
        "image": pa.array([{"bytes": b"\xff\xd8", "path": None}] * len(texts)),
        "day": pa.array([datetime.date(2020, 1, 2)] * len(texts)),
    }),
    OUT / "text.snappy.parquet", compression="snappy", row_group_size=7)

chats = [
    [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "Hello", "name": "bot"}],
    [{"role": "system", "content": "Be brief.", "name": None}, {"role": "user", "content": "?", "name": None}],
]
pq.write_table(
    pa.table({"messages": chats, "score": [0.5, float("nan")], "tags": [["a", "b"], []]}),
    OUT / "chats.zstd.parquet", compression="zstd")

pq.write_table(pa.table({"body": ["a", "b"], "n": [1, 2]}), OUT / "body.gzip.parquet", compression="gzip")

# Strings without the annotation that they are UTF-8, as old writers left them.
pq.write_table(pa.table({"text": pa.array([b"plain", b"\xff\xfe"], pa.binary())}), OUT / "binary.parquet",
               compression="none")

with open(OUT / "text.json", "w") as file:
    json.dump([text for text in texts if text], file)
