"""The benchmarks of the model card's table, as "How Far Can Camels Go?" (Wang et al. 2023) ran them.

What lm-evaluation-harness has is named here; what it lacks is in ``assets/tasks``, whose YAML files use the functions below.
They work on the hub's data sets and on anything in the same form.
"""

from __future__ import annotations

import collections
import re
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = Path(__file__).parents[1] / "assets" / "tasks"
SAMPLE_SEED = 42
GSM_SAMPLE = 200  # of 1,319: the paper found the score the same
BBH_SAMPLE = 40  # of each task's 250
TYDIQA_SAMPLE = 100  # of each language
PASSAGE_TOKENS = 512  # longer passages are cut
CODE_SECONDS = 3.0  # for one program, as in the Codex paper


@dataclass(frozen=True)
class Suite:
    """One column of the card's table.

    tasks: names for the harness. fewshot: examples before a question, where the task does not say itself. limit: the first
    so many documents of each task, where the task does not draw a sample itself.
    """

    about: str
    tasks: tuple[str, ...]
    fewshot: int | None = None
    limit: int | None = None
    runs_code: bool = False


SUITES = {
    "mmlu-0shot": Suite("MMLU, no examples", ("mmlu",), fewshot=0),
    "mmlu-5shot": Suite("MMLU, 5 examples of the subject", ("mmlu",), fewshot=5),
    "gsm-direct": Suite("GSM8K, 8 examples with the bare answer, 200 questions", ("camels_gsm_direct",)),
    "gsm-cot": Suite("GSM8K, 8 examples with a chain of thought, 200 questions", ("camels_gsm_cot",)),
    "bbh-direct": Suite("BIG-Bench Hard, 3 examples, 40 questions a task", ("bbh_fewshot",), limit=BBH_SAMPLE),
    "bbh-cot": Suite("BIG-Bench Hard with chains of thought, 40 questions a task", ("bbh_cot_fewshot",), limit=BBH_SAMPLE),
    "tydiqa-gp": Suite("TyDiQA with the gold passage, 1 example, 100 questions a language", ("camels_tydiqa_gp",)),
    "tydiqa-cb": Suite("TyDiQA closed-book, 1 example, 100 questions a language", ("camels_tydiqa_cb",)),
    "codex-eval-pass1": Suite("HumanEval, pass@1 of 20 programs drawn at 0.1", ("camels_codex_pass1",), runs_code=True),
    "codex-eval-pass10": Suite("HumanEval, pass@10 of 20 programs drawn at 0.8", ("camels_codex_pass10",), runs_code=True),
}


def sample(documents: Any, count: int) -> Any:
    """At most ``count`` documents of a `datasets` table, drawn with the paper's seed."""
    return documents.shuffle(seed=SAMPLE_SEED).select(range(min(count, len(documents))))


# ------------------------------------------------------------------------------------------------ GSM8K


def gsm_documents(documents: Any) -> Any:
    return sample(documents, GSM_SAMPLE)


def _without_commas(text: str) -> str:
    return re.sub(r"(\d),(\d)", r"\1\2", text)


def last_number(answers: Sequence[Sequence[str]], documents: Sequence[dict]) -> list[list[str]]:
    """A filter: the last number of each answer, or the whole answer where it has none."""
    del documents

    def of(answer: str) -> str:
        numbers = re.findall(r"[-+]?\d*\.\d+|\d+", _without_commas(answer))
        return numbers[-1] if numbers else answer.strip()

    return [[of(answer) for answer in some] for some in answers]


# ------------------------------------------------------------------------------------------------ TyDiQA

LANGUAGES = ("arabic", "bengali", "english", "finnish", "indonesian", "korean", "russian", "swahili", "telugu")

passage_cutter: ContextVar[Callable[[str], str]] = ContextVar("passage_cutter", default=lambda passage: passage)
"""Cuts a passage to PASSAGE_TOKENS tokens of the model that is evaluated; `tinygptq eval` sets it."""


def cut_by(tokenizer: Any) -> Callable[[str], str]:
    """A passage's first PASSAGE_TOKENS tokens, as text."""

    def cut(passage: str) -> str:
        ids = tokenizer.encode(passage, bos=False)
        return passage if len(ids) <= PASSAGE_TOKENS else tokenizer.decode(ids[:PASSAGE_TOKENS])

    return cut


def _of_language(language: str) -> Callable[[Any], Any]:
    def documents(table: Any) -> Any:
        """The paper's sample of one language; a document's id begins with it."""
        own = [i for i, id in enumerate(table["id"]) if id.split("-")[0] == language]
        return sample(table.select(own), TYDIQA_SAMPLE)

    return documents


tydiqa_arabic, tydiqa_bengali, tydiqa_english, tydiqa_finnish, tydiqa_indonesian, tydiqa_korean, tydiqa_russian, \
    tydiqa_swahili, tydiqa_telugu = map(_of_language, LANGUAGES)  # fmt: skip


def _with_passage(passage: str, question: str, answer: str) -> Callable[[dict], str]:
    def prompt(document: dict) -> str:
        cut = passage_cutter.get()(document["context"])
        return f"{passage} {cut}\n{question} {document['question']}\n{answer}"

    return prompt


gp_arabic = _with_passage("المقطع:", "السؤال:", "الإجابة:")
gp_bengali = _with_passage("অধ্যায়:", "প্রশ্ন:", "উত্তর:")
gp_english = _with_passage("Passage:", "Question:", "Answer:")
gp_finnish = _with_passage("Kappale:", "Kysymys:", "Vastaus:")
gp_indonesian = _with_passage("Bagian:", "Pertanyaan:", "Jawaban:")
gp_korean = _with_passage("문단:", "질문:", "답변:")
gp_russian = _with_passage("Отрывок:", "Вопрос:", "Ответ:")
gp_swahili = _with_passage("Kifungu:", "Swali:", "Jibu:")
gp_telugu = _with_passage("పేరా:", "ప్రశ్న:", "సమాధానం:")


def first_answer(document: dict[str, Any]) -> str:
    return document["answers"]["text"][0]


def squad_scores(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F1 and exact match in per cent, the best over the document's answers, as SQuAD 1.1 scores (Rajpurkar et al. 2016)."""
    found = results[0].strip()
    answers = document["answers"]["text"] or [""]
    exact = max(float(squad_words(found) == squad_words(answer)) for answer in answers)
    return {"f1": 100 * max(_f1(found, answer) for answer in answers), "exact_match": 100 * exact}


def squad_words(text: str) -> list[str]:
    """The words that count: lower case, no ASCII punctuation, no English articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(found: str, answer: str) -> float:
    ours, theirs = squad_words(found), squad_words(answer)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


# ------------------------------------------------------------------------------------------------ HumanEval


def whole_programs(answers: Sequence[Sequence[str]], documents: Sequence[dict]) -> list[list[str]]:
    """A filter: each answer continues its document's prompt."""
    return [[document["prompt"] + one for one in some] for some, document in zip(answers, documents, strict=True)]


def humaneval_test(document: dict[str, str]) -> str:
    return f"{document['test']}\ncheck({document['entry_point']})"


def codex_pass(document: dict[str, str], results: Sequence[Any]) -> dict[str, float]:
    """pass@1 and pass@10 of a problem's programs, each run with its tests in a process of its own."""
    programs = results[0] if isinstance(results[0], list) else list(results)
    right = sum(passes(program, humaneval_test(document)) for program in programs)
    return {f"pass@{k}": pass_at_k(len(programs), right, k) for k in (1, 10) if k <= len(programs)}


def passes(program: str, test: str, seconds: float = CODE_SECONDS) -> bool:
    """Whether a program and its test run to the end. The code is the model's: this runs it, with no protection but a time
    limit and an empty folder, so the harness asks for a flag first."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", f"{program}\n{test}\n"],
                cwd=folder, timeout=seconds,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, OSError, ValueError):  # ValueError: a null character in the program
            return False
    return done.returncode == 0


def pass_at_k(drawn: int, right: int, k: int) -> float:
    """The unbiased estimate that one of k programs is right, when ``right`` of ``drawn`` are (Chen et al. 2021)."""
    wrong = drawn - right
    miss = 1.0
    for i in range(k):  # the probability that k draws without replacement are all wrong
        miss *= max(wrong - i, 0) / (drawn - i)
    return 1.0 - miss
