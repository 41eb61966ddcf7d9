"""A folder of tasks for lm-evaluation-harness, over a book: choices, texts to continue, texts to predict."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = "1"  # before datasets is imported

import pytest

TASK = """\
task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
  cache_dir: {folder}/cache
test_split: test
target_delimiter: ""
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """\
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """\
doc_to_target: "x"
generation_kwargs: {until: [".", "!"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
PREDICT = """\
doc_to_target: "{{document}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory, book: str) -> Path:
    """The folder: tasks "choice", "write" and "predict", with documents of some 80 to 200 tokens."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(name: str, kind: str, rest: str, documents: list[dict[str, Any]]) -> None:
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, folder=folder) + rest)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))

    starts = [10_000, 30_000, 50_000]
    texts = [book[start : start + 300 + 200 * i] for i, start in enumerate(starts)]
    ends = [start + len(text) for start, text in zip(starts, texts, strict=True)]
    # the right one, one from elsewhere, a single token
    choices = [[book[end : end + 30], book[end + 5000 : end + 5040], "the"] for end in ends]
    choices.append([" a", " the", " Anne"])
    write(
        "choice",
        "multiple_choice",
        CHOICE,
        [{"text": t, "choices": c, "label": 0} for t, c in zip([*texts, "It was "], choices, strict=True)],
    )
    write("write", "generate_until", WRITE, [{"text": text} for text in texts])
    write("predict", "loglikelihood_rolling", PREDICT, [{"text": "", "document": text} for text in texts[:2]])
    return folder
