"""The examples of the guide."""

import re

from conftest import ROOT


def examples(kind):
    """The blocks of Python of docs/src/python.md with this word after their language, as one program."""
    text = (ROOT / "docs/src/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python(,\w+)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [code for word, code in blocks if word == (f",{kind}" if kind else "")]
