"""Models and traces, compared with the program."""

import json

import numpy as np
import pytest

import gd_attention as gd


def test_generate_equals_the_program(gd_program, trained):
    model = gd.load(trained)
    for flags, options in [
        (["--temperature", 0], {"temperature": 0}),
        (["--temperature", 0.9, "--top-k", 20, "--seed", 5], {"temperature": 0.9, "top_k": 20, "seed": 5}),
        (["--temperature", 0, "--repetition-penalty", 1.5], {"temperature": 0, "repetition_penalty": 1.5}),
        (["--seed", 3, "--top-p", 0.8, "--min-p", 0.01], {"seed": 3, "top_p": 0.8, "min_p": 0.01}),
    ]:
        line = gd_program("generate", trained, "--prompt", "It was", "--max-tokens", 12, "--json", *flags)
        expected = json.loads(line)
        generated = model.generate("It was", max_tokens=12, **options)
        assert generated.tokens == expected["token_ids"] and generated.text == expected["text"]
        assert generated.finish_reason == expected["finish_reason"] == "length"


def test_stop_strings_end_a_text(trained):
    model = gd.load(trained)
    whole = model.generate("It was", max_tokens=12, temperature=0)
    stop = whole.text[4:6]
    stopped = model.generate("It was", max_tokens=12, temperature=0, stop=[stop])
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"
    assert model.decode(model.encode("It was")) == "It was"
    assert model.config["model_type"] and "layers" in repr(model)


def test_a_parameter_out_of_range_is_an_error(trained):
    with pytest.raises(ValueError, match="temperature must be finite and at least 0, not -1"):
        gd.load(trained).generate("It was", temperature=-1)


@pytest.fixture(scope="module")
def trace_file(gd_program, trained, tmp_path_factory):
    file = tmp_path_factory.mktemp("trace") / "it.trace"
    gd_program("trace", trained, "--prompt", "It was", "--max-tokens", 4, "--temperature", 0, "--out", file)
    return file


def test_arrays_of_a_trace_equal_the_export(gd_program, trace_file):
    trace = gd.read_trace(trace_file)
    exported = trace_file.with_suffix(".npz")
    gd_program("trace", "--from", trace_file, "--export", exported)
    arrays = trace.arrays()
    with np.load(exported) as npz:
        assert sorted(npz) == sorted(arrays)
        for name in npz:
            assert npz[name].dtype == arrays[name].dtype, name
            assert np.array_equal(npz[name], arrays[name], equal_nan=npz[name].dtype.kind == "f"), name
    assert len(trace) == len(arrays["token"]) == 10 and arrays["generated"].sum() == 4
    assert "".join(trace.texts).startswith("It was")
    assert trace.header["prompt_tokens"] == 6 and trace.head in repr(trace)


def test_a_notebook_shows_the_page_of_the_viewer(gd_program, trace_file):
    import html

    page = trace_file.with_suffix(".html")
    gd_program("trace", "--from", trace_file, "--html", page)
    trace = gd.read_trace(trace_file)
    assert trace.page() == page.read_text()
    cell = trace._repr_html_()
    assert cell.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts"' in cell
    quoted = cell.split('"')[1]
    assert html.unescape(quoted) == trace.page()


def test_a_damaged_trace_is_an_error(trace_file, tmp_path):
    damaged = bytearray(trace_file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file = tmp_path / "damaged.trace"
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged.trace"):
        gd.read_trace(file)
