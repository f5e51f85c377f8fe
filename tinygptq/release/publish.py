"""All published permutations of a model, a folder for each branch, and the card; one after another or on a Dask cluster.

A branch is a :class:`Job`, which any process that sees the same files can run: it writes its folder whole or not at all,
running it again continues what was begun, and on a finished folder it does nothing. So a worker may be killed at any moment,
and a run repeated at any time.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinygptq.branches import BRANCHES
from tinygptq.config import LlamaConfig, QuantizeConfig, read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import find_quantize_config
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.language_model import load
from tinygptq.measure.evaluate import Perplexity
from tinygptq.quantization.resume import remove_leftovers
from tinygptq.quantization.run import quantize
from tinygptq.release.card import MARK, ModelFacts, ProvidedFile, model_card
from tinygptq.release.facts import calibration_facts, read_meta, replace_text, text_facts, update_meta
from tinygptq.release.hub import model_name, resolve

log = logging.getLogger("tinygptq")

LOCAL = "local"  # in place of a scheduler's address
LOCAL_WORKERS = 2
RETRIES = 2  # of a branch whose job raised; one whose worker died is given to another worker up to Dask's own limit, 3
CONNECT_SECONDS = 20


@dataclass(frozen=True)
class Recipe:
    """What all branches share: the calibration text (see tinygptq.quantize) and, if it is to be measured, the perplexity's.

    perplexity: a file or a named set; windows have ``seqlen`` tokens, at most ``max_windows`` of them (None: all).
    """

    dataset: str = "wikitext2"
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0
    template: str = "tulu"
    perplexity: str | None = None
    max_windows: int | None = None


@dataclass(frozen=True)
class Job:
    """One branch. src, folder: absolute paths, which a worker must see under the same names."""

    branch: str
    src: str
    folder: str
    config: QuantizeConfig
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """How a branch ended: error is None if its folder is there; kept means that it was finished before."""

    branch: str
    error: str | None = None
    kept: bool = False
    seconds: float = 0.0


def publish(
    src: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    only: Sequence[str] = (),
    cluster: str | None = None,
    revision: str | None = None,
    card: dict[str, Any] | None = None,
) -> list[Outcome]:
    """Make the branches of :data:`tinygptq.branches.BRANCHES` under ``out``, with ``out/README.md`` and a copy in each.

    Args:
        only: names of branches, instead of all. Folders of the others are left alone, and are on the card if they exist.
        cluster: None runs one after another here; ``local`` on two processes of this machine; else a Dask scheduler's
            address. Its workers need tinygptq and must see ``src``, ``out`` and the texts under the same paths.
        card: what :meth:`tinygptq.release.card.ModelFacts.of` takes.

    Returns:
        An outcome for each branch, failed ones included (also an earlier one that has broken), in the order of BRANCHES.
    Raises:
        TinyGPTQError: what would make every branch fail, before any is begun.
    """
    recipe, place = recipe or Recipe(), Path(out).resolve()
    jobs = _jobs(resolve(src, revision).resolve(), place, recipe, only)
    facts = ModelFacts.of(Path(jobs[0].src), **{"template": recipe.template, **(card or {})})
    _require_ours(place)
    _make_folder(place)
    run = map(_run_here, jobs) if cluster is None else run_on_cluster(jobs, cluster)
    outcomes = {}
    for outcome in run:
        outcomes[outcome.branch] = outcome
        log.info("%s: %s", outcome.branch, _told(outcome))
    _note_original([job for job in jobs if not outcomes[job.branch].error])
    outcomes |= _write_cards(place, facts, {branch for branch, outcome in outcomes.items() if outcome.error})
    return [outcomes[name] for name in BRANCHES if name in outcomes]


def _told(outcome: Outcome) -> str:
    if outcome.error:
        return f"failed: {outcome.error}"
    return "was finished already" if outcome.kept else f"done in {outcome.seconds:.1f} s"


def _jobs(src: Path, out: Path, recipe: Recipe, only: Sequence[str]) -> list[Job]:
    """The jobs, with paths that another process can use, after looking at what they all need."""
    for name in only:
        if name not in BRANCHES:
            raise TinyGPTQError(f"no branch is called {name!r}; there are {', '.join(BRANCHES)}")
    LlamaConfig.from_folder(src)
    if find_quantize_config(src) is not None:
        raise TinyGPTQError(f"{src}: is quantised already; branches are made from fp16, bf16 or fp32")
    for text in (recipe.dataset, recipe.perplexity):
        if text is not None:
            text_facts(text)
    absolute = {key: str(Path(text).resolve()) for key in ("dataset", "perplexity")
                if (text := getattr(recipe, key)) is not None and Path(text).is_file()}  # fmt: skip
    recipe = Recipe(**{**asdict(recipe), **absolute})
    names = [name for name in BRANCHES if name in only or not only]
    return [Job(name, str(src), str(out / name), BRANCHES[name], recipe) for name in names]


def _require_ours(out: Path) -> None:
    """Raise unless ``out`` is new, or holds nothing but branches, hidden files and a card of ours."""
    if out.exists() and not out.is_dir():
        raise TinyGPTQError(f"{out}: is a file; branches need a folder")
    for path in out.iterdir() if out.exists() else ():
        if path.name == "README.md" and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            raise TinyGPTQError(f"{path}: was not written by tinygptq; move it away, or choose another folder")
        if path.name not in (*BRANCHES, "README.md") and not path.name.startswith("."):
            raise TinyGPTQError(f"{out}: holds {path.name}, which is no branch; choose another folder")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TinyGPTQError(f"{out}: cannot be made ({error.strerror})") from None


def _write_cards(out: Path, facts: ModelFacts, failed: set[str]) -> dict[str, Outcome]:
    """The card of all branches that are there, in ``out`` and in each of them; returns failures of those that are broken."""
    files, broken = [], {}
    for name in BRANCHES:
        if name not in failed and (out / name / "quantize_config.json").exists():
            try:
                files.append(ProvidedFile.of(out / name, name))
            except TinyGPTQError as error:
                broken[name] = Outcome(name, str(error))
    if files:
        text = model_card(facts, files)
        for folder in (out, *(out / file.branch for file in files)):
            replace_text(folder / "README.md", text)
    return broken


# ---------------------------------------------------------------------------------------------------- one branch

_one_at_a_time = threading.Lock()  # a worker with several threads still has one memory, and the kernels use every core


def run_job(job: Job) -> Outcome:
    """Make one branch, or what is missing of it. A mistake of the user's is an outcome; anything else is raised."""
    started = time.perf_counter()
    with _one_at_a_time:
        try:
            kept = is_finished(job)
            if not kept:
                _quantize(job)
            remove_leftovers(Path(job.folder))
            measured = _measure(job)
        except TinyGPTQError as error:
            return Outcome(job.branch, str(error))
    return Outcome(job.branch, None, kept and not measured, time.perf_counter() - started)


def _run_here(job: Job) -> Outcome:
    """The job in this process; whatever it raises is an outcome, because the other branches are still to come."""
    try:
        return run_job(job)
    except Exception as error:
        log.debug("%s", job.branch, exc_info=True)
        return _raised(job, error)


def _raised(job: Job, error: Exception) -> Outcome:
    return Outcome(job.branch, f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}")


def is_finished(job: Job) -> bool:
    """Whether the folder is there and is what the job would write.

    Raises:
        TinyGPTQError: the folder holds something else, which is not ours to remove.
    """
    folder = Path(job.folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    recipe = job.recipe
    wanted = calibration_facts(recipe.dataset, recipe.nsamples, recipe.seqlen, recipe.seed, recipe.template)
    wanted["model_name_or_path"] = model_name(Path(job.src))
    del wanted["quantizer"]  # another version's work is kept
    noted = {**read_json(folder / "quantize_config.json"), **read_meta(folder)}
    differing = [f"{key} {noted.get(key)!r}, not {value!r}" for key, value in wanted.items() if noted.get(key) != value]
    if LlamaConfig.from_folder(folder) != LlamaConfig.from_folder(Path(job.src)):
        differing.insert(0, "a model of another shape")
    if find_quantize_config(folder) != job.config:
        differing.insert(0, "another quantisation config")
    if differing:
        raise TinyGPTQError(f"{folder}: was made with {differing[0]}; remove it to make it again")
    TensorFile(folder / "model.safetensors")  # raises if it is not whole
    return True


def _quantize(job: Job) -> None:
    folder, recipe = Path(job.folder), job.recipe
    if not Path(job.src).is_dir():
        raise TinyGPTQError(f"{job.src}: not to be seen from {socket.gethostname()}; workers must share SRC and OUT")
    quantize(
        job.src,
        folder,
        job.config,
        dataset=recipe.dataset,
        nsamples=recipe.nsamples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        template=recipe.template,
        resume=True,
    )


def _measure(job: Job) -> bool:
    """Measure the perplexity, if it is wanted and not yet noted; returns whether it did."""
    folder, recipe = Path(job.folder), job.recipe
    if recipe.perplexity is None:
        return False
    wanted = {**text_facts(recipe.perplexity), "asked": [recipe.seqlen, recipe.max_windows]}
    noted = read_meta(folder).get("perplexity") or {}
    if all(noted.get(key) == value for key, value in wanted.items()):
        return False
    update_meta(folder, perplexity={**wanted, **asdict(_perplexity(folder, recipe))})
    return True


def _perplexity(folder: Path, recipe: Recipe) -> Perplexity:
    from tinygptq.calibrate import evaluation_text  # only here: it may import tokenizers and datasets

    assert recipe.perplexity is not None
    model = load(folder, context=2)  # windows go through the model whole, without the engine's cache
    return model.perplexity(evaluation_text(recipe.perplexity, model.tokenizer), recipe.seqlen, recipe.max_windows)


def _note_original(done: list[Job]) -> None:
    """Note the unquantised model's perplexity beside each branch's; it is measured once, for those that lack it."""
    noted = {job: read_meta(Path(job.folder))["perplexity"] for job in done if job.recipe.perplexity is not None}
    lacking = [job for job, perplexity in noted.items() if "unquantised" not in perplexity]
    if not lacking:
        return
    known = [perplexity["unquantised"] for perplexity in noted.values() if "unquantised" in perplexity]
    value = known[0] if known else _perplexity(Path(done[0].src), done[0].recipe).perplexity
    for job in lacking:
        update_meta(Path(job.folder), perplexity={**noted[job], "unquantised": value})


# ---------------------------------------------------------------------------------------------------- on a cluster


def run_on_cluster(jobs: Iterable[Job], address: str) -> Iterator[Outcome]:
    """Run jobs on a Dask cluster, yielding outcomes as they come.

    A job that raised is tried again, and one whose worker died is given to another, which continues what it had begun.

    Raises:
        TinyGPTQError: Dask is not installed, or no scheduler answers at the address.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise TinyGPTQError("--cluster needs the package distributed: pip install tinygptq[cluster]") from None
    with ExitStack() as stack:
        stack.enter_context(_quiet_log())
        where = stack.enter_context(_local_cluster()) if address == LOCAL else address
        try:
            client = stack.enter_context(Client(where, timeout=CONNECT_SECONDS))
        except (OSError, ValueError, RuntimeError) as error:
            raise TinyGPTQError(f"--cluster {address}: no Dask scheduler answers there ({error})") from None
        futures = {client.submit(run_job, job, pure=False, retries=RETRIES): job for job in jobs}
        for future in as_completed(futures):
            yield _outcome(future, futures[future])


def _outcome(future: Any, job: Job) -> Outcome:
    """What came of a job, whether it returned, raised or took its workers with it."""
    try:
        outcome = future.result()
    except Exception as error:  # one branch's failure, of whatever kind, must not lose the others
        return _raised(job, error)
    if outcome.error is None and not (Path(job.folder) / "quantize_config.json").exists():
        return Outcome(job.branch, f"{job.folder}: a worker wrote it, but it is not here; workers must share OUT's files")
    return outcome


def _local_cluster() -> Any:
    """Two processes that share this machine's cores; each runs one branch at a time."""
    import dask
    from distributed import LocalCluster

    threads = str(max(1, (os.cpu_count() or 1) // LOCAL_WORKERS))
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = {**dict.fromkeys(names, threads), "TQDM_DISABLE": "1"}  # bars of two processes would mix
    settings = {
        "distributed.nanny.environ": environment,  # set in the workers alone
        "distributed.scheduler.worker-ttl": None,  # compiled code may keep a worker from answering for minutes
    }
    with dask.config.set(settings):
        return LocalCluster(n_workers=LOCAL_WORKERS, threads_per_worker=1, processes=True, memory_limit=0,
                            dashboard_address=":0", silence_logs=logging.CRITICAL)  # fmt: skip


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Dask reports every connection, and a lost worker over many lines; what came of each branch is told here."""
    levels = {name: logging.getLogger(name).level for name in ("distributed", "distributed.client")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
