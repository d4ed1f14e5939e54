"""Two tasks with all that trackers choke on: a name with "/", None, text, targets of two types."""

from __future__ import annotations

from pathlib import Path

CODE = """
import datasets

def rows(**_):
    words = ["red", "blue", "long", "warm", "cold", "near", "late", "wide"]
    made = [{"text": f"It is {w}, not", "label": n % 2, "id": n} for n, w in enumerate(words)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(made)})

def mixed(doc, results):
    right = doc["id"] % 3
    return {"exact_match": float(results[0][:1] == "a"), "odd": None if right else "text"}

def target(doc):
    return doc["id"] if doc["id"] % 2 else ["x", "y"]

def nothing(values):
    return None
"""
CHOICE = """
task: org/choice
custom_dataset: !function parts.rows
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["old", "new and shiny"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
TALK = """
task: talk
custom_dataset: !function parts.rows
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
doc_to_text: "{{text}}"
doc_to_target: !function parts.target
process_results: !function parts.mixed
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: odd, aggregation: !function parts.nothing, higher_is_better: true}
metadata: {version: 1.0}
"""


def write_tasks(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parts.py").write_text(CODE)
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "talk.yaml").write_text(TALK)
    return folder
