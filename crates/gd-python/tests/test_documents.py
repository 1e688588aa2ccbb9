"""The examples of the guide run, except those of PyTorch."""

import re

import numpy as np
from conftest import ROOT
from documents import examples

import gd_attention as gd


def test_the_guide():
    blocks = examples("")
    assert len(blocks) >= 5
    exec(compile("".join(blocks), "python.md", "exec"), {})


def test_the_guide_to_models(gd_program, trained, tmp_path, monkeypatch):
    blocks = examples("model")
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    gd_program("trace", trained, "--prompt", "It was", "--out", "it.trace")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tiny").symlink_to(trained)
    names = {"gd": gd, "np": np}
    exec(compile("".join(blocks), "python.md", "exec"), names)
    assert names["distance"].shape == names["arrays"]["selected"].shape


def test_the_readme():
    text = (ROOT / "crates/gd-python/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
