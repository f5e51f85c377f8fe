"""Where a model is: a folder, or a repository of the Hugging Face hub, downloaded into the hub's own cache.

The package ``huggingface_hub`` does the work, and so its variables apply: HF_ENDPOINT (another hub), HF_TOKEN (private and
gated repositories), HF_HOME (where the cache is), HF_HUB_OFFLINE (the cache alone). A connection that breaks is taken up
where it broke, and files that are complete are not fetched again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinygptq.errors import TinyGPTQError
from tinygptq.folders.export import COMPANIONS

CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")  # never pickles, and no GGUF: they are other copies of the model
CARD = "README.md"  # a new card quotes it

REPOSITORY = re.compile(r"[\w][\w.-]*/[\w.-]+", re.ASCII)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how git-lfs begins a file that it has not fetched
POINTER_BYTES = 1024  # at most, by git-lfs's specification
NAMED_BRANCHES = 12  # in an error, of however many there are


def resolve(source: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: ``source`` itself, or the cached download of ``owner/name`` or ``owner/name:branch``.

    Args:
        source: a str or, for a folder only, a Path. A folder that exists is never looked for on the hub.
        revision: branch, tag or commit; the same as ``:branch``.
        weights: False leaves the .safetensors files where they are, for commands that read configs only.

    Raises:
        TinyGPTQError: no such folder, repository or branch, no right to read it, no network, or a git clone without
            its large files.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise TinyGPTQError(f"{source}: is a folder; --revision {revision} can only choose a branch of a repository")
        _refuse_lfs_pointers(folder)
        return folder
    if folder.exists():
        raise TinyGPTQError(f"{source}: no such folder, but a file")
    repo, _, branch = str(source).partition(":")
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")) or "\\" in str(source):
        raise TinyGPTQError(f"{source}: no such folder")
    if not REPOSITORY.fullmatch(repo):
        raise TinyGPTQError(f"{source}: no such folder or file (a repository would be OWNER/NAME or OWNER/NAME:BRANCH)")
    if Path(repo).is_dir():
        raise TinyGPTQError(f"{repo}: is a folder; ':{branch}' can only choose a branch of a repository")
    if branch and revision and branch != revision:
        raise TinyGPTQError(f"{source}: --revision {revision} contradicts ':{branch}'")
    return _download(repo, branch or revision, weights)


def model_name(folder: Path) -> str:
    """``owner/name`` of a folder in the hub's cache (models--owner--name/snapshots/commit), else the folder's own name."""
    folder = Path(folder).resolve()
    kind, _, repo = folder.parent.parent.name.partition("--")
    return repo.replace("--", "/", 1) if folder.parent.name == "snapshots" and kind == "models" else folder.name


def _refuse_lfs_pointers(folder: Path) -> None:
    """Raise if a clone was made without git-lfs: small text files then stand where weights should be."""
    for path in [*sorted(folder.glob("*.safetensors")), folder / "tokenizer.model", folder / "tokenizer.json"]:
        if path.is_file() and path.stat().st_size <= POINTER_BYTES and path.read_bytes().startswith(LFS_POINTER):
            raise TinyGPTQError(
                f"{path}: is a git-lfs pointer, not the file itself; run `git lfs install` and `git lfs pull` in {folder}"
            )


# ------------------------------------------------------------------------------------------------------- downloading


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise TinyGPTQError(
            f"{repo}: no such folder; to download a repository, pip install tinygptq[hf] (huggingface_hub)"
        ) from None
    patterns = [*CONFIGS, *COMPANIONS, CARD, *(WEIGHTS if weights else ())]
    with _log_errors_only():
        try:
            folder = Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*"],  # "*" also stands for slashes: subfolders hold other formats
                    tqdm_class=_progress_bar(),
                )
            )
        except Exception as error:  # whatever the network, the hub or the disk raises ends as one line
            raise TinyGPTQError(_explain(error, repo, revision)) from None
    if weights and not any(folder.glob("*.safetensors")):
        raise TinyGPTQError(
            f"{repo}: the repository holds no .safetensors file at {revision or 'main'}; PyTorch pickles and GGUF files are "
            "not downloaded (fetch them yourself, then see `tinygptq convert`)"
        )
    return folder


@contextmanager
def _log_errors_only() -> Iterator[None]:
    """The hub's log reports every attempt; the one line at the end is enough."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _progress_bar() -> type:
    """The hub's progress bar, but silent where stderr is not a terminal."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            kwargs["disable"] = kwargs.get("disable") or None  # None: tqdm itself asks whether it is a terminal
            super().__init__(*args, **kwargs)

    return Bar


# ------------------------------------------------------------------------------------------------------- what went wrong


def _explain(error: Exception, repo: str, revision: str | None) -> str:
    """One line for whatever huggingface_hub raised: what was found, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, where = constants.ENDPOINT, f"{repo}:{revision}" if revision else repo
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, of which it is a kind
        return f"{where}: the repository is gated; accept its terms at {hub}/{repo} and set HF_TOKEN to that account's token"
    if isinstance(error, RepositoryNotFoundError):
        return f"{where}: no such folder, and no such repository at {hub} (a private one needs HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo}: no branch {revision or 'main'!r}{_branches(repo)}"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    response = getattr(cause, "response", None) if isinstance(cause, HfHubHTTPError) else None
    status = response.status_code if response is not None else None  # a requests.Response of 401 is false
    if status == 401:
        return f"{where}: {hub} refuses the token; set HF_TOKEN to a valid one, or to nothing"
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return f"{where}: no such folder, and not complete in the cache; HF_HUB_OFFLINE forbids downloading it"
        if status is not None:
            return f"{where}: {hub} answers with status {status}; try later, or give a folder"
        return f"{where}: no such folder, and {hub} cannot be reached ({_first_line(cause)}); give a folder instead"
    return f"{where}: the download failed ({type(error).__name__}: {_first_line(error)})"


def _branches(repo: str) -> str:
    """``; it has main, ...``, or nothing when the hub does not say."""
    from huggingface_hub import HfApi

    try:
        names = [branch.name for branch in HfApi().list_repo_refs(repo).branches]
    except Exception:  # this is the text of an error already; a second one would hide the first
        return ""
    more = [f"and {len(names) - NAMED_BRANCHES} more"] if len(names) > NAMED_BRANCHES else []
    return f"; it has {', '.join(sorted(names)[:NAMED_BRANCHES] + more)}" if names else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
