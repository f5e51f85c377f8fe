"""Runs lm-evaluation-harness on a loaded model: suites of the card's table, tasks of ours, and any of its own tasks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinygptq.errors import TinyGPTQError
from tinygptq.language_model import LanguageModel
from tinygptq.measure import benchmarks
from tinygptq.measure.benchmarks import SUITES
from tinygptq.measure.harness import harness_model
from tinygptq.templates import FOLDER_TEMPLATE, get_template


@dataclass(frozen=True)
class Options:
    """What holds for every task of a run; None leaves it to the task or the suite.

    fewshot: examples before a question. limit: documents of a task, or a share of them if below 1. batch_size: sequences
    scored in one pass. template: of prompts as conversations, a name or FOLDER_TEMPLATE. system: a system message.
    multiturn: examples as turns of the conversation. gen_kwargs: generation settings. include: a folder of more tasks.
    seed: of the examples' choice. run_code: let tasks run programs that the model wrote. cache: a file that keeps answers,
    so that a run that was cut off does not ask again.
    """

    fewshot: int | None = None
    limit: float | None = None
    batch_size: int | None = None
    template: str | None = None
    system: str | None = None
    multiturn: bool = True
    gen_kwargs: dict[str, Any] | None = None
    include: Path | None = None
    seed: int = 1234  # the harness's own
    run_code: bool = False
    cache: Path | None = None


@dataclass
class Outcome:
    """results: of each run, as the harness gives them (without samples). tables: the same for people. samples: by task."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list] = field(default_factory=dict)


def run_tasks(model: LanguageModel, names: Sequence[str], options: Options, output: Path | None = None) -> Outcome:
    """Evaluate suites (by their names) and tasks of the harness or of ours (all together).

    Args:
        output: folder for results and samples, in the harness's own form.

    Raises:
        TinyGPTQError: the harness is not installed, an unknown name, a task that would run code without leave, or data that
            cannot be had.
    """
    if options.template not in (None, FOLDER_TEMPLATE):
        get_template(options.template)
    adapter = harness_model(model, options.batch_size, options.template or FOLDER_TEMPLATE)
    plain = [name for name in names if name not in SUITES]
    manager = _task_manager([task for name in names for task in (SUITES[name].tasks if name in SUITES else [name])],
                            options.include)  # fmt: skip
    outcome = Outcome()
    token = benchmarks.passage_cutter.set(benchmarks.cut_by(model.tokenizer))
    try:
        for name in names:
            if name in SUITES:
                suite = SUITES[name]
                _run(outcome, name, adapter, manager, suite.tasks, options, suite, output)
        if plain:
            _run(outcome, "tasks", adapter, manager, manager.match_tasks(plain), options, None, output)
    finally:
        benchmarks.passage_cutter.reset(token)
    return outcome


def _task_manager(names: Sequence[str], include: Path | None) -> Any:
    """Knows every one of ``names``; the harness's own thousands are read only for what ours and ``include`` do not have."""
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise TinyGPTQError(f"{include}: no such folder of tasks")
    folders = [str(folder) for folder in (benchmarks.TASKS, *([include] if include else []))]
    for defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=defaults)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise TinyGPTQError(f"unknown task {unknown[0]!r}; suites of the card's table are {', '.join(SUITES)}, and "
                        "`lm-eval ls tasks` lists the harness's own")  # fmt: skip


def _run(
    outcome: Outcome, name: str, adapter: Any, manager: Any, tasks: Sequence[str], options: Options,
    suite: benchmarks.Suite | None, output: Path | None,
) -> None:  # fmt: skip
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import make_table

    if suite is not None and suite.runs_code and not options.run_code:
        raise TinyGPTQError(f"{name} runs programs that the model writes; --run-code allows it")
    if options.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the harness's own tasks ask for
    fewshot = options.fewshot if options.fewshot is not None or suite is None else suite.fewshot
    limit = options.limit if options.limit is not None or suite is None else suite.limit
    tracker = EvaluationTracker(output_path=str(output / name) if suite and output else str(output) if output else None)
    try:
        results = simple_evaluate(
            adapter, model_args={"pretrained": str(adapter.model.checkpoint.folder.name)}, tasks=list(tasks),
            num_fewshot=fewshot, limit=limit, batch_size=options.batch_size, system_instruction=options.system,
            apply_chat_template=options.template is not None,
            fewshot_as_multiturn=options.multiturn and options.template is not None,
            use_cache=options.cache and _cache_of(options.cache, adapter.model.checkpoint.folder),
            gen_kwargs=options.gen_kwargs, task_manager=manager, evaluation_tracker=tracker, log_samples=True,
            fewshot_random_seed=options.seed, confirm_run_unsafe_code=options.run_code,
        )  # fmt: skip
    except TinyGPTQError:
        raise
    except Exception as error:
        raise _explained(error, name) from error
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, found in samples.items():
        outcome.samples[task] = found
        tracker.save_results_samples(task_name=task, samples=found)
    outcome.results[name] = results
    outcome.tables[name] = make_table(results) + ("\n" + make_table(results, "groups") if results.get("groups") else "")


def _cache_of(cache: Path, folder: Path) -> str:
    """The cache file's name for one model: the harness itself would give one model's answers to another."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.glob("*.*"))
    return f"{cache}-{hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:12]}"


def _explained(error: Exception, name: str) -> Exception:
    """One line for what a user can mend: data that cannot be had, code that may not be run; anything else as it is."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, ValueError) and "unsafe" in first:
        return TinyGPTQError(f"{name} runs programs that the model writes; --run-code allows it")
    if isinstance(error, OSError) or type(error).__module__.startswith(("datasets", "huggingface_hub")):
        return TinyGPTQError(f"{name}: its data cannot be loaded ({type(error).__name__}: {first})")
    return error
