"""The adapter for lm-evaluation-harness: what it answers, without and (where it is installed) with the harness."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import local_tasks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygptq
from tinygptq.cli import main
from tinygptq.errors import TinyGPTQError
from tinygptq.generate import generate_ids
from tinygptq.measure import benchmarks
from tinygptq.measure.harness import Adapter, harness_model, rolling_windows
from tinygptq.measure.harness_run import Options, run_tasks
from tinygptq.measure.scoring import Request, log_likelihood
from tinygptq.sampling import Sampler, SamplingParams

OPENING = "Once upon a time, there was a little"
INSTALLED = importlib.util.find_spec("lm_eval") is not None
with_harness = pytest.mark.skipif(not INSTALLED, reason="lm-evaluation-harness is not installed")


class Noted:
    """In the place of the harness's cache of answers."""

    def __init__(self) -> None:
        self.seen = []

    def add_partial(self, kind, request, answer) -> None:
        self.seen.append((kind, request, answer))


@pytest.fixture(autouse=True)
def no_survey_of_the_machine(monkeypatch):
    """The harness lists every installed package in each run's record, which takes longer than the runs here."""
    if INSTALLED:
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def model(embedded: Path) -> tinygptq.LanguageModel:
    return tinygptq.load(embedded)


@pytest.fixture
def adapter(model) -> Adapter:
    adapter = Adapter(model, template="tulu")
    adapter.cache_hook = Noted()
    return adapter


def asked(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


# ------------------------------------------------------------------------------------------------ log-likelihoods


def test_requests_that_do_not_fit_lose_their_beginning(adapter):
    ids = np.random.default_rng(0).integers(3, 2000, 600).tolist()
    ((found, greedy),) = adapter._loglikelihood_tokens([(("a", "b"), ids[:590], ids[590:])], disable_tqdm=True)
    kept = ids[600 - (512 + 1) :]
    expected = log_likelihood(adapter.model.engine.model, Request(kept[:-10], kept[-10:]))
    assert (found, greedy) == (pytest.approx(expected.logprob, abs=1e-3), expected.is_greedy)
    assert adapter.cache_hook.seen == [("loglikelihood", ("a", "b"), (found, greedy))]
    with pytest.raises(TinyGPTQError, match="an answer of 513 tokens does not fit the context of 512"):
        adapter._loglikelihood_tokens([(("a", "b"), [5], ids[:513])])


@given(count=st.integers(0, 50), length=st.integers(1, 12))
def test_rolling_windows_predict_each_token_once_with_what_fits_before_it(count, length):
    windows = rolling_windows(list(range(1, count + 1)), 0, length)
    assert [token for window in windows for token in window.continuation] == list(range(1, count + 1))
    for window in windows:
        whole = [*window.context, *window.continuation]
        assert whole == list(range(whole[0], whole[-1] + 1))
        assert 1 <= len(window.inputs) <= length
    assert all(len(window.inputs) == length for window in windows[1:])


def test_a_rolling_likelihood_is_that_of_the_whole_text(adapter):
    text = "Once upon a time, there was a little girl. She liked to play."
    ids = adapter.tok_encode(text)
    (found,) = adapter.loglikelihood_rolling([asked(text)], disable_tqdm=True)
    expected = log_likelihood(adapter.model.engine.model, Request([adapter.prefix_token_id], ids))
    assert found == pytest.approx(expected.logprob, abs=1e-3)


def test_bos_follows_the_folder_and_is_not_doubled(adapter):
    tokenizer = adapter.model.tokenizer
    bare = tokenizer.encode("cat", bos=False)
    assert adapter.tok_encode("cat") == tokenizer.encode("cat")
    assert adapter.tok_encode("cat", add_special_tokens=True) == [tokenizer.bos_id, *bare]
    assert adapter.tok_encode("cat", add_special_tokens=False) == bare
    assert adapter.tok_encode("<s>cat").count(tokenizer.bos_id) == 1


# ------------------------------------------------------------------------------------------------ generating


def test_greedy_answers_end_before_their_stop_strings(adapter):
    whole = adapter.model.generate(OPENING, max_new_tokens=20, temperature=0.0)
    word = whole[: whole.index(" ", 1)]
    stop = whole[12:15]
    requests = [
        asked(OPENING, {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.9}),
        asked(OPENING, {"until": stop, "max_new_tokens": 20}),
        asked(OPENING + word, {"until": ["\x00", stop], "max_tokens": 20}),
    ]
    first, second, third = adapter.generate_until(requests, disable_tqdm=True)
    drops = adapter.model.tokenizer.strips_space and whole.startswith(" ")  # as if the answer were decoded alone
    assert first == whole[drops:]
    assert second == whole[drops : whole.index(stop)]
    assert third.strip() == whole[len(word) : whole.index(stop)].strip()
    assert [kind for kind, _, _ in adapter.cache_hook.seen] == ["generate_until"] * 3


def test_answers_given_together_are_those_given_one_by_one(adapter, embedded, monkeypatch):
    """Requests of different settings are kept apart; each text ends at its own stop string."""
    requests = [
        asked(OPENING, {"until": ["."], "max_gen_toks": 30}),
        asked("The cat", {"until": [], "max_gen_toks": 9}),
        asked("Lily wanted", {"until": ["."], "max_gen_toks": 30}),
        asked("Tom", {"until": ["."], "max_gen_toks": 30}),
    ]
    alone = adapter.generate_until(requests, disable_tqdm=True)
    engine, plain, batches = adapter.model.engine, tinygptq.load(embedded).engine, []

    def together(prompts, samplers, most, eos_token_ids, ended):
        batches.append(len(prompts))
        found = []
        for number, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True)):
            found.append([])
            for token in generate_ids(plain, prompt, sampler, most, eos_token_ids):
                found[-1].append(token)
                if ended(number, token):
                    break
        return found

    monkeypatch.setattr(engine, "rows", 2, raising=False)
    monkeypatch.setattr(engine, "can_draw", lambda sampler: True, raising=False)
    monkeypatch.setattr(engine, "draw_ahead", lambda sampler, most: iter(()), raising=False)
    monkeypatch.setattr(engine, "generate_batch", together, raising=False)
    assert adapter.generate_until(requests, disable_tqdm=True) == alone
    assert sorted(batches) == [1, 1, 2]


def test_sampling_differs_between_requests_and_repeats_itself(adapter):
    requests = [asked(OPENING, {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5})] * 3
    texts = adapter.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 1
    assert adapter.generate_until(requests, disable_tqdm=True) == texts


def test_long_prompts_lose_their_beginning(adapter):
    settings = {"until": [], "max_gen_toks": 500, "temperature": 0}
    (found,) = adapter.generate_until([asked("The cat. " * 50 + OPENING, settings)], disable_tqdm=True)
    ids = adapter.tok_encode("The cat. " * 50 + OPENING)[-12:]
    expected = adapter.model.generate(ids, max_new_tokens=500, temperature=0.0)
    assert found.strip() == expected.strip()
    with pytest.raises(TinyGPTQError, match="512 new tokens, which leave no room"):
        adapter.generate_until([asked("x", {"max_gen_toks": 512})], disable_tqdm=True)


def test_an_engine_that_keeps_its_beginning_gives_the_same_tokens(model):
    prompts = [OPENING, OPENING + " cat who", OPENING, "The dog", "The dog and", OPENING + " cat who liked"]
    expected = [model.generate(prompt, max_new_tokens=6, temperature=0.0) for prompt in prompts]
    original, prefilled = model.engine.prefill, []
    model.engine.prefill = lambda ids: prefilled.append(len(ids)) or original(ids)
    try:
        for prompt, continuation in zip(prompts, expected, strict=True):
            ids = model.tokenizer.encode(prompt)
            sampler = Sampler(SamplingParams(), model.config.vocab_size, (), None)
            found = list(generate_ids(model.sequence, ids, sampler, 6, ()))
            assert model.tokenizer.decode([*ids, *found]) == prompt + continuation
    finally:
        del model.engine.prefill
    assert sum(prefilled) < sum(len(model.tokenizer.encode(prompt)) for prompt in prompts) / 2


# ------------------------------------------------------------------------------------------------ chat templates


def test_chat_templates(adapter, model):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert adapter.apply_chat_template(history[:1]) == "<|user|>\nHi\n<|assistant|>\n"
    assert adapter.apply_chat_template(history, add_generation_prompt=False) == "<|user|>\nHi\n<|assistant|>\nHello"
    assert adapter.chat_template(True) == "tulu"
    assert adapter.chat_template(False) is None
    assert adapter.tokenizer_name == "storyteller-tulu"
    own = Adapter(model)
    with pytest.raises(TinyGPTQError, match="the folder has no chat template; name one"):
        own.apply_chat_template(history)


# ------------------------------------------------------------------------------------------------ the benchmarks' rules


def test_the_last_number_counts():
    answers = [["so 3 and 1,234.", "no number ", "-5 or 7.25"]]
    assert benchmarks.last_number(answers, [{}]) == [["1234", "no number", "7.25"]]


@pytest.mark.parametrize(
    ("found", "f1", "exact"),
    [
        ("The Eiffel Tower.", 100, 100),
        ("eiffel", 100 * 2 / 3, 0),
        ("a tower in Paris", 100 * 2 / 5, 0),
        ("nothing", 0, 0),
        ("", 0, 0),
        ("big ben", 100, 100),
    ],
)
def test_squad_scores_are_the_best_over_the_answers(found, f1, exact):
    scores = benchmarks.squad_scores({"answers": {"text": ["the Eiffel Tower", "Big Ben"]}}, [found])
    assert scores == {"f1": pytest.approx(f1), "exact_match": exact}


@pytest.mark.parametrize(("drawn", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 1), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_program(drawn, right, k):
    import itertools

    draws = list(itertools.combinations([True] * right + [False] * (drawn - right), k))
    assert benchmarks.pass_at_k(drawn, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_programs_are_run_apart_and_not_for_ever():
    document = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one"}
    answers = ["    return 1", "    return 2", "    while True: pass", "    exit(3)", "    return 1\x00"]
    (programs,) = benchmarks.whole_programs([answers], [document])
    test = benchmarks.humaneval_test(document)
    assert [benchmarks.passes(program, test, seconds=1.5) for program in programs] == [True, False, False, False, False]
    assert benchmarks.codex_pass(document, [programs[:2]]) == {"pass@1": 0.5}


def test_passages_are_cut_by_tokens(model):
    cut = benchmarks.cut_by(model.tokenizer)
    long = "The cat sat. " * 400
    assert cut("The cat sat.") == "The cat sat."
    assert len(model.tokenizer.encode(cut(long), bos=False)) <= benchmarks.PASSAGE_TOKENS + 1
    assert long.startswith(cut(long))


# ------------------------------------------------------------------------------------------------ through the harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return local_tasks.write_tasks(tmp_path_factory.mktemp("tasks"), count=8)


@with_harness
def test_local_tasks_through_the_harness(model, tasks, tmp_path):
    outcome = run_tasks(model, list(local_tasks.TASKS), Options(include=tasks, limit=6), tmp_path / "out")
    results = outcome.results["tasks"]["results"]
    assert {name: found["sample_len"] for name, found in results.items()} == dict.fromkeys(local_tasks.TASKS, 6)
    stories = outcome.samples["local_endings"]
    for sample in stories:
        expected = [model.loglikelihood(sample["doc"]["story"], " " + ending) for ending in sample["doc"]["endings"]]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert np.allclose(found, [one.logprob for one in expected], atol=1e-3)
    written = {path.name.split("_20")[0] for path in (tmp_path / "out").rglob("*.json*")}
    assert written == {"results", *(f"samples_{name}" for name in local_tasks.TASKS)}
    assert "local_letters" in outcome.tables["tasks"]


@with_harness
def test_answers_in_a_cache_are_not_asked_for_again(model, tasks, tmp_path, monkeypatch):
    options = Options(include=tasks, limit=3, cache=tmp_path / "answers")
    first = run_tasks(model, list(local_tasks.TASKS), options)

    def refuse(self, *_, **__):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(Adapter, "_loglikelihood_tokens", refuse)
    monkeypatch.setattr(Adapter, "loglikelihood_rolling", refuse)
    monkeypatch.setattr(Adapter, "generate_until", refuse)
    again = run_tasks(model, list(local_tasks.TASKS), options)
    assert again.results["tasks"]["results"] == first.results["tasks"]["results"]
    other = tinygptq.load(shutil.copytree(model.checkpoint.folder, tmp_path / "other"))
    with pytest.raises(AssertionError, match="asked again"):
        run_tasks(other, ["local_endings"], options)


@with_harness
def test_fewshot_limit_and_chat_template_arrive(model, tasks):
    options = Options(include=tasks, limit=2, fewshot=1, template="tulu", system="Be brief.", batch_size=1)
    outcome = run_tasks(model, ["local_letters"], options)
    (context, answer), *_ = [list(one.values()) for one in _arguments(outcome.samples["local_letters"][0])]
    assert context.startswith("<|system|>\nBe brief.")
    assert context.count("<|assistant|>\n") == 2
    assert context.endswith("<|assistant|>\n")
    assert answer == "A"


def _arguments(sample: dict) -> list[dict]:
    arguments = sample["arguments"]
    return list(arguments.values()) if isinstance(arguments, dict) else [dict(enumerate(one)) for one in arguments]


def local_copy(folder: Path, name: str, base: str, data: dict[str, list[dict]], **extra: str) -> None:
    """A task of ours with its data set swapped for files."""
    files = {}
    for split, rows in data.items():
        files[split] = str(folder / f"{name}-{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"include: {benchmarks.TASKS / base}", f"task: {name}", "dataset_path: json", "dataset_name: null"]
    lines += [f"dataset_kwargs: {{data_files: {json.dumps(files)}}}", *(f"{key}: {value}" for key, value in extra.items())]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


@with_harness
@pytest.mark.parametrize("kind", ["direct", "cot"])
def test_gsm_prompts_follow_the_paper(model, tmp_path, kind):
    rows = [{"question": f"What is {i} + 1000?", "answer": f"We add.\n#### {1000 + i:,}"} for i in range(3)]
    local_copy(tmp_path, "gsm", f"camels_gsm_{kind}.yaml", {"test": rows})
    outcome = run_tasks(model, ["gsm"], Options(include=tmp_path, gen_kwargs={"max_gen_toks": 3}))
    sample = outcome.samples["gsm"][0]
    prompt = next(iter(_arguments(sample)[0].values()))
    assert prompt.startswith("Answer the following questions.\n\nQuestion: There are 15 trees in the grove.")
    answer = "Answer: 6\n\n" if kind == "direct" else "Answer: There are 15 trees originally."
    assert answer in prompt
    assert prompt.count("Question: ") == 9
    assert prompt.endswith(f"\n\nQuestion: {sample['doc']['question']}\nAnswer:")
    assert sample["target"] in ("1000", "1001", "1002")


@with_harness
@pytest.mark.parametrize("kind", ["gp", "cb"])
def test_tydiqa_prompts_follow_the_paper(model, tmp_path, kind):
    def rows(count: int) -> list[dict]:
        answers = {"text": ["Oslo"], "answer_start": [3]}
        return [
            {"id": f"{language}-{i}", "context": f"In Oslo, {i}.", "question": f"Where {i}?", "answers": answers}
            for i in range(count)
            for language in ("english", "finnish")
        ]

    local_copy(tmp_path, "tydiqa", f"camels_tydiqa_{kind}_finnish.yaml", {"train": rows(3), "validation": rows(2)})
    outcome = run_tasks(model, ["tydiqa"], Options(include=tmp_path, gen_kwargs={"max_gen_toks": 3}))
    assert len(outcome.samples["tydiqa"]) == 2
    sample = outcome.samples["tydiqa"][0]
    prompt = next(iter(_arguments(sample)[0].values()))
    i = sample["doc"]["question"][6:-1]
    passage = f"Kappale: In Oslo, {i}.\n" if kind == "gp" else ""
    assert prompt.endswith(f"\n\n{passage}Kysymys: Where {i}?\nVastaus:")
    assert prompt.startswith("Vastaa seuraavaan kysymykseen")
    assert prompt.count("Kysymys:") == 2
    assert "Vastaus: Oslo\n\n" in prompt
    assert outcome.results["tasks"]["results"]["tydiqa"]["f1,none"] == 0


@with_harness
def test_programs_are_run_only_with_leave(model, tmp_path):
    rows = [{"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one", "task_id": "T/0"}]
    local_copy(tmp_path, "codex", "camels_codex_pass1.yaml", {"test": rows}, repeats="2")
    options = {"include": tmp_path, "gen_kwargs": {"max_gen_toks": 2}}
    with pytest.raises(TinyGPTQError, match="--run-code allows it"):
        run_tasks(model, ["codex"], Options(**options))
    with pytest.raises(TinyGPTQError, match="codex-eval-pass1 runs programs that the model writes; --run-code allows it"):
        run_tasks(model, ["codex-eval-pass1"], Options(**options))
    found = run_tasks(model, ["codex"], Options(**options, run_code=True)).results["tasks"]["results"]["codex"]
    assert found["pass@1,programs"] == 0


@with_harness
def test_every_task_of_ours_can_be_found():
    from tinygptq.measure.harness_run import _task_manager

    ours = {task for suite in benchmarks.SUITES.values() for task in suite.tasks if task.startswith("camels_")}
    assert len(ours) == 6
    manager = _task_manager(sorted(ours), None)
    assert len(manager.all_tasks) == 6 + 2 * len(benchmarks.LANGUAGES)


@with_harness
@pytest.mark.slow
def test_every_task_of_a_suite_is_known_to_the_harness(embedded, capsys):
    """Reading the harness's own thousands of tasks takes most of a minute."""
    from tinygptq.measure.harness_run import _task_manager

    names = [task for suite in benchmarks.SUITES.values() for task in suite.tasks]
    assert set(names) <= set(_task_manager(names, None).all_tasks)
    assert main(["eval", str(embedded), "--tasks", "no_such_task"]) == 2
    assert "unknown task 'no_such_task'; suites of the card's table are mmlu-0shot" in capsys.readouterr().err


@with_harness
def test_the_command(embedded, tasks, tmp_path, capsys):
    words = ["eval", str(embedded), "--tasks", "local_endings", "--include-path", str(tasks), "--limit", "2", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["results"]["local_endings"]["sample_len"] == 2


def test_without_the_harness_one_line_says_how_to_get_it(model, monkeypatch):
    import sys

    from tinygptq.measure import harness

    harness._adapter_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(TinyGPTQError, match=r"pip install tinygptq\[eval\]"):
        harness_model(model)
    harness._adapter_class.cache_clear()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "{model}"], "--tasks names nothing"),
        (["eval", "--tasks", "x"], "a MODEL is missing"),
        (["eval", "{model}", "--tasks", "x", "--limit", "0"], "--limit is 0"),
        (["eval", "{model}", "--tasks", "x", "--gen-kwargs", "a"], "expected KEY=VALUE"),
    ],
)
def test_mistakes_on_the_command_line(embedded, capsys, words, message):
    assert main([word.replace("{model}", str(embedded)) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_the_suites_are_listed(capsys):
    assert main(["eval", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(benchmarks.SUITES)
