"""Calibration text: a file or a named set -> windows of token ids.

Everything becomes one stream of tokens, encoded by the model's own tokenizer and its own BOS rule. A file gives
consecutive windows from its start (so the windows are known from the file alone); a named set gives random ones, drawn
by seed without overlap. Text is never repeated to fill a window that there is not enough text for.
"""

from __future__ import annotations

import io
import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.records import RecordWriter, conversations, file_text
from tinygptq.templates import Message
from tinygptq.tokenizer import Tokenizer

log = logging.getLogger("tinygptq")

CHARS_PER_TOKEN = 6  # English has about four: how much of a long text to try first
MARGIN = 256
STREAM_FACTOR = 4  # tokens gathered from a set of documents for each token wanted
ALTERNATIVE = "a local file needs no network: --dataset FILE.txt or FILE.jsonl"
HEADING = re.compile(r" =( =)* .* =( =)* \n")  # of WikiText
NOT_TEXT = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst")


@dataclass(frozen=True)
class NamedSet:
    """Where a named set lies on the Hugging Face hub: the arguments of `datasets.load_dataset`."""

    path: str
    splits: tuple[str, ...]
    config: str | None = None
    revision: str | None = None
    data_files: dict[str, str] | None = None
    column: str | None = None  # of plain text; None: records or conversations, written through the prompt template
    in_order: bool = True  # one running text; False: documents of their own, taken in random order


NAMED_SETS = {
    "wikitext2": NamedSet("Salesforce/wikitext", ("train", "validation", "test"), "wikitext-2-raw-v1", column="text"),
    "c4": NamedSet(
        "allenai/c4",
        ("train", "validation"),
        column="text",
        in_order=False,
        data_files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    # the set's own loading script no longer runs; the hub keeps its tables converted under this revision
    "ptb": NamedSet(
        "ptb-text-only/ptb_text_only",
        ("train", "validation", "test"),
        "penn_treebank",
        revision="refs/convert/parquet",
        column="sentence",
    ),
    "databricks-dolly-15k": NamedSet("databricks/databricks-dolly-15k", ("train",), in_order=False),
    "oasst1": NamedSet("OpenAssistant/oasst1", ("train", "validation"), in_order=False),
    "CodeAlpaca-20k": NamedSet("sahil2801/CodeAlpaca-20k", ("train",), in_order=False),
}


@dataclass(frozen=True)
class DatasetSpec:
    """A parsed --dataset: a file (``path``), or a set (``name``) and its split."""

    path: Path | None = None
    name: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return str(self.path) if self.path else f"{self.name}:{self.split}"

    @property
    def entry(self) -> NamedSet:
        """What is known of a named set."""
        assert self.name is not None
        return NAMED_SETS[self.name]


def parse_dataset(text: str | Path) -> DatasetSpec:
    """Read what --dataset says: FILE.txt, FILE.jsonl or NAME[:split]. Anything else is a TinyGPTQError."""
    path = Path(text)
    name, _, split = str(text).partition(":")
    if name in NAMED_SETS and not path.is_file():
        split = split or "train"
        if split not in NAMED_SETS[name].splits:
            raise TinyGPTQError(f"dataset {name} has no split {split!r}; it has {', '.join(NAMED_SETS[name].splits)}")
        return DatasetSpec(name=name, split=split)
    if not path.is_file():
        raise TinyGPTQError(f"dataset {str(text)!r} is neither a file nor one of {', '.join(NAMED_SETS)}")
    if path.suffix.lower() in NOT_TEXT:
        raise TinyGPTQError(f"{path}: expected a .txt or .jsonl file, found {path.suffix}")
    return DatasetSpec(path=path)


def calibration_windows(
    dataset: str | Path, tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int = 0, template: str = "tulu"
) -> np.ndarray:
    """Token ids to calibrate with: int32 [nsamples, seqlen].

    dataset: FILE.txt, FILE.jsonl (a text; prompt and response; instruction, input and output; or messages in each
        line) or a name of NAMED_SETS with an optional ``:split``.
    seed: draws the windows of a named set; a file's windows are consecutive from its start.
    template: how instructions are written (templates.TEMPLATES, or "chat" for the folder's own chat template).

    Raises TinyGPTQError when there are fewer than nsamples * seqlen tokens, when a file cannot be read as such, or
    when a named set cannot be had.
    """
    if nsamples < 1 or seqlen < 2:
        raise TinyGPTQError(f"calibration needs nsamples >= 1 and seqlen >= 2, found {nsamples} and {seqlen}")
    spec = parse_dataset(dataset)
    writer = RecordWriter(tokenizer, template)
    if spec.path:
        ids = _encode_start(tokenizer, file_text(spec.path, writer), nsamples * seqlen)
        _check_enough(spec, len(ids), nsamples, seqlen)
        return ids[: nsamples * seqlen].reshape(nsamples, seqlen)
    rng = np.random.default_rng(seed)
    ids = _set_tokens(spec, tokenizer, writer, nsamples * seqlen, rng)
    _check_enough(spec, len(ids), nsamples, seqlen)
    return draw_windows(ids, nsamples, seqlen, rng)


@dataclass(frozen=True)
class Published:
    """How papers on quantisation make one text of a named set to measure perplexity on (the GPTQ authors' own code)."""

    about: str
    split: str
    between: str  # rows are joined by it
    rows: int | None = None  # the first so many
    windows: int | None = None  # of 2,048 tokens; None: all that fit


PUBLISHED = {
    "wikitext2": Published("WikiText-2's raw test split, rows joined by blank lines", "test", "\n\n"),
    "ptb": Published("Penn Treebank's test split, sentences joined by spaces", "test", " "),
    "c4": Published(
        "the first 1,100 documents of C4's validation split, joined by spaces; 256 windows",
        "validation",
        " ",
        rows=1100,
        windows=256,
    ),
}


def evaluation_text(dataset: str | Path, tokenizer: Tokenizer, protocol: str | None = None) -> str:
    """One text to measure perplexity on: a file as it is, or a named set of PUBLISHED in its published form.

    protocol: "wikitext2" reads a file as that set's raw split, lines for rows, and makes the published text of it.

    Raises TinyGPTQError as above.
    """
    spec = parse_dataset(dataset)
    if spec.path:
        text = file_text(spec.path, RecordWriter(tokenizer, "none"))
        return wikitext_rows_joined(text) if protocol == "wikitext2" else text
    if spec.name not in PUBLISHED:
        raise TinyGPTQError(f"dataset {spec.name} is a set of documents, not one text; {ALTERNATIVE}")
    published = PUBLISHED[spec.name]
    if ":" not in str(dataset):
        spec = DatasetSpec(name=spec.name, split=published.split)
    column = spec.entry.column
    try:
        return published.between.join(row[column] for row in itertools.islice(_load(spec), published.rows))
    except KeyError as error:
        raise _schema_changed(spec, error) from None


def wikitext_rows_joined(text: str) -> str:
    """The published WikiText-2 text of a raw split: its lines, those of white space alone empty, joined by blank lines.

    Copies of the file without its empty lines are about. They stand before and after each heading, where they are put back;
    those between paragraphs are lost (59 of the test split's 1,467).
    """
    lines = [line if line.strip() else "" for line in io.StringIO(text.replace("\r\n", "\n"), newline="\n")]
    if "" in lines:
        return "\n\n".join(lines)
    log.warning("the text has no empty lines; WikiText-2's are put back before and after each heading")
    return "\n\n".join(row for line in lines for row in (["", line, ""] if HEADING.fullmatch(line) else [line]))


def draw_windows(ids: np.ndarray, nsamples: int, seqlen: int, rng: np.random.Generator) -> np.ndarray:
    """Random windows of a stream that do not overlap, in random order: ids [n] -> [nsamples, seqlen].

    The tokens left over are spread at random as gaps before the windows.
    """
    spare = len(ids) - nsamples * seqlen
    starts = np.sort(rng.integers(0, spare + 1, nsamples)) + seqlen * np.arange(nsamples)
    rng.shuffle(starts)
    return ids[starts[:, None] + np.arange(seqlen)]  # (nsamples, seqlen)


def _check_enough(spec: DatasetSpec, tokens: int, nsamples: int, seqlen: int) -> None:
    if tokens >= nsamples * seqlen:
        return
    found = f"{spec} holds {tokens} token{'s' * (tokens != 1)}" if tokens else f"{spec} holds no text"
    fits = [f"--nsamples {tokens // seqlen}"] if tokens >= seqlen else []
    fits += [f"--seqlen {tokens // nsamples}"] if tokens // nsamples >= 2 else []
    wanted = f"{nsamples} windows of {seqlen} need" if nsamples > 1 else f"1 window of {seqlen} needs"
    raise TinyGPTQError(
        f"{found}; {wanted} {nsamples * seqlen} tokens: " + (f"{' or '.join(fits)} would fit" if fits else "give more text")
    )


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of one running text, BOS by the folder's rule; a text without a character has no ids at all."""
    return np.array(tokenizer.encode(text) if text else [], dtype=np.int32)


def _encode_start(tokenizer: Tokenizer, text: str, needed: int) -> np.ndarray:
    """At least ``needed`` ids from the start of ``text``, if it has so many; a long text is not encoded whole.

    A cut changes the ids beside it, so it lies at least MARGIN tokens behind the last one needed.
    """
    size = CHARS_PER_TOKEN * (needed + MARGIN)
    while True:
        ids = _encode(tokenizer, text[:size])
        if size >= len(text) or len(ids) >= needed + MARGIN:
            return ids
        size *= 2


# ------------------------------------------------------------------------------------------------ named sets


def _load(spec: DatasetSpec) -> Any:
    """The rows of a named set, through the optional package `datasets` and, the first time, the network."""
    entry = spec.entry
    try:
        import datasets
    except ImportError:
        raise TinyGPTQError(
            f"dataset {spec.name} needs the package datasets (pip install tinygptq[data]); {ALTERNATIVE}"
        ) from None
    options: dict[str, Any] = {"revision": entry.revision} if entry.revision else {}
    if entry.data_files:  # only the one file that is used, not the whole set
        options["data_files"] = {spec.split: entry.data_files[spec.split]}
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)  # without a network it reports every retry; the one line below is enough
    try:
        return datasets.load_dataset(entry.path, *filter(None, [entry.config]), split=spec.split, **options)
    except Exception as error:  # whatever the network, the hub or a cache raises: the answer is the same
        first = (str(error).splitlines() or [""])[0]
        raise TinyGPTQError(f"dataset {spec} cannot be loaded ({type(error).__name__}: {first}); {ALTERNATIVE}") from None
    finally:
        hub_log.setLevel(level)


def _set_tokens(
    spec: DatasetSpec, tokenizer: Tokenizer, writer: RecordWriter, needed: int, rng: np.random.Generator
) -> np.ndarray:
    """One stream of ids [n] of a named set; of documents, a random choice of STREAM_FACTOR times what is needed."""
    entry, rows = spec.entry, _load(spec)
    try:
        if entry.in_order:
            return _encode(tokenizer, "\n\n".join(rows[entry.column]))  # as the GPTQ paper's code joins them
        documents = conversations(rows) if spec.name == "oasst1" else rows
        texts = (_document(documents[int(i)], entry, writer, f"{spec} row {i}") for i in rng.permutation(len(documents)))
        return _document_tokens(texts, tokenizer, STREAM_FACTOR * needed)
    except KeyError as error:
        raise _schema_changed(spec, error) from None


def _schema_changed(spec: DatasetSpec, error: KeyError) -> TinyGPTQError:
    return TinyGPTQError(f"dataset {spec}: the field {error} is missing, so its schema has changed; {ALTERNATIVE}")


def _document(document: dict | list[Message], entry: NamedSet, writer: RecordWriter, where: str) -> str:
    if isinstance(document, list):
        return writer.conversation(document)
    return document[entry.column] + "\n\n" if entry.column else writer.record(document, where)


def _document_tokens(texts: Iterator[str], tokenizer: Tokenizer, wanted: int) -> np.ndarray:
    """Ids [n] of documents joined, of no more of them than give ``wanted`` ids (a set can be larger than memory)."""
    joined, size = "", CHARS_PER_TOKEN * wanted
    while True:
        parts, length = [joined], len(joined)
        while length < size and (text := next(texts, None)) is not None:
            parts.append(text)
            length += len(text)
        joined = "".join(parts)
        ids = _encode(tokenizer, joined)
        if length < size or len(ids) >= wanted:
            return ids
        size *= 2
