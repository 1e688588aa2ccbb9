#!/usr/bin/env python3
"""Makes two tasks of lm-eval from a text, for machines that cannot fetch the data of its own tasks.

    scripts/bench/lm_eval_task.py TEXT DIR
    scripts/bench/lm_eval.sh MODEL last_word,paragraphs --include_path DIR

`last_word` is the last word of every paragraph of 40 to 120 words given those before it, as in LAMBADA: accuracy of the
greedy answer, and perplexity. `paragraphs` is the bits per byte of the same paragraphs.
"""

import json
import re
import sys
from pathlib import Path

LAST_WORD = """task: last_word
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{word}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""
PARAGRAPHS = """task: paragraphs
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{paragraph}}"
metric_list:
  - metric: bits_per_byte
"""


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    text, folder = Path(sys.argv[1]).read_text(), Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if 40 <= len(words) <= 120:
            paragraph = " ".join(words)
            context, word = paragraph.rsplit(" ", 1)
            lines.append(dict(paragraph=paragraph, context=context, word=word))
    data = folder / "paragraphs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    for name, task in [("last_word", LAST_WORD), ("paragraphs", PARAGRAPHS)]:
        (folder / f"{name}.yaml").write_text(task + where)
    print(f"{folder}: {len(lines)} paragraphs")


if __name__ == "__main__":
    main()
