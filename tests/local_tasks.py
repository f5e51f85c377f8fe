"""Small benchmarks in the form of the harness's own, on data written here: nothing is fetched."""

from __future__ import annotations

import json
import random
from pathlib import Path

ANIMALS = ("cat", "dog", "bird", "rabbit", "fox", "mouse", "duck", "frog")
PLACES = ("garden", "park", "forest", "house", "river", "school")
NAMES = ("Lily", "Tom", "Mia", "Ben", "Sara", "Max")

# as MMLU: four lettered choices, five examples before each question
LETTERS = """task: local_letters
dataset_path: json
dataset_kwargs: {{data_files: {{dev: {dev}, test: {test}}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
num_fewshot: 5
output_type: multiple_choice
description: "The following are questions about a story.\\n\\n"
doc_to_text: >-
  {{{{question}}}}
  A. {{{{choices[0]}}}} B. {{{{choices[1]}}}} C. {{{{choices[2]}}}} D. {{{{choices[3]}}}}
  Answer:
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

# as HellaSwag: the choices are continuations of several tokens
ENDINGS = """task: local_endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{story}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

# as GSM8K: an answer is generated up to a stop string
ANSWERS = """task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{dev: {dev}, test: {test}}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
num_fewshot: 3
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n", "Question:"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""

ROLLING = """task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{story}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""

TASKS = {"local_letters": LETTERS, "local_endings": ENDINGS, "local_answers": ANSWERS, "local_rolling": ROLLING}


def documents(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        name, place, animal = rng.choice(NAMES), rng.choice(PLACES), rng.choice(ANIMALS)
        choices = [animal, *rng.sample([other for other in ANIMALS if other != animal], 3)]
        rng.shuffle(choices)
        story = f"Once upon a time, {name} went to the {place} and saw a little {animal}."
        made.append({
            "question": f"{story} What did {name} see?", "choices": choices, "answer": choices.index(animal), "story": story,
            "endings": [f"The {choice} was very happy to see {name}." for choice in choices],
        })  # fmt: skip
    return made


def write_tasks(folder: Path, count: int = 30) -> Path:
    """The data and a YAML file for each of TASKS; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"dev": folder / "dev.jsonl", "test": folder / "test.jsonl"}
    for (split, file), number in zip(files.items(), (8, count), strict=True):
        file.write_text("".join(json.dumps(one) + "\n" for one in documents(number, seed=len(split))))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(**files))
    return folder
