"""The model card of a quantised repository: what is offered, how it was made, how to fetch and run it.

Its outline is that of the GPTQ releases people know: YAML front matter, prompt template, a table of provided files with the
parameters explained, downloading, Python, compatibility, the original card. Every figure of the table is read from the
folders themselves: sizes from the files, the rest from what was noted when they were made
(:mod:`tinygptq.release.facts`), and who can load them is what :mod:`tinygptq.release.inspect_folder` finds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygptq.branches import BRANCHES
from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.release.facts import read_meta
from tinygptq.release.hub import model_name
from tinygptq.release.inspect_folder import inspect_folder
from tinygptq.templates import get_template

HUB = "https://huggingface.co"
MARK = "<!-- model card written by tinygptq -->"  # what may be written over


@dataclass(frozen=True)
class ModelFacts:
    """What the card says of the model, as opposed to its files.

    base_model: the original repository. datasets: what the original was trained on. repo: where the card will stand.
    template: a key of templates.TEMPLATES. original_card: Markdown, without front matter.
    """

    base_model: str
    model_name: str
    model_creator: str
    quantized_by: str
    repo: str
    license: str = "other"
    language: tuple[str, ...] = ("en",)
    datasets: tuple[str, ...] = ()
    template: str = "tulu"
    original_card: str = ""

    def __post_init__(self) -> None:
        get_template(self.template)  # an unknown one should be known before any work is done

    @classmethod
    def of(cls, source: Path, **given: Any) -> ModelFacts:
        """What is ``given`` (None counts as not given), else what the source folder's README.md says, else its name."""
        readme = source / "README.md"
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        stated, body = split_front_matter(text)
        chosen = {key: value for key, value in given.items() if value}
        base = chosen.get("base_model") or model_name(source)
        owner, _, name = base.rpartition("/")
        defaults: dict[str, Any] = {
            "base_model": base,
            "model_name": name,
            "model_creator": owner or "unknown",
            "quantized_by": "tinygptq",
            "repo": f"YOUR-NAME/{name}-GPTQ",
            "original_card": body.strip(),
        }
        for key in ("license", "language", "datasets", "model_name", "model_creator"):
            if value := stated.get(key):
                many = key in ("language", "datasets")
                defaults[key] = (tuple([value] if isinstance(value, str) else value)) if many else str(value)
        return cls(**{**defaults, **chosen})


@dataclass(frozen=True)
class ProvidedFile:
    """One row of the table. size: bytes of the weights. loaders, remarks: as ``tinygptq inspect`` found them."""

    branch: str
    quantization: QuantizeConfig
    meta: dict[str, Any]
    size: int
    loaders: dict[str, list[str]]
    remarks: dict[str, str]

    @classmethod
    def of(cls, folder: Path, branch: str) -> ProvidedFile:
        """Inspect a quantised folder; all of it is read once.

        Raises:
            TinyGPTQError: no such folder, it is not quantised, or it cannot be loaded.
        """
        found = inspect_folder(folder)
        if found.problems:
            raise TinyGPTQError(f"{folder}: {found.problems[0]}")
        if found.quantization is None:
            raise TinyGPTQError(f"{folder}: is not quantised, so there is nothing for a GPTQ model card to say")
        meta = read_meta(folder) if (folder / "quantize_config.json").exists() else {}
        size = sum(found.files.values())
        return cls(branch, found.quantization.config, meta, size, found.loaders, found.remarks)

    @property
    def exllama(self) -> bool:
        """Whether ExLlama loads it; version 2, whose demands are the lesser ones."""
        return not self.loaders["ExLlama v2"]


def provided_files(folders: Sequence[Path]) -> list[ProvidedFile]:
    """A row for each folder, its name being the branch; a single folder of another name is ``main``."""
    alone = len(folders) == 1 and folders[0].resolve().name not in BRANCHES
    return [ProvidedFile.of(folder, "main" if alone else folder.resolve().name) for folder in folders]


# --------------------------------------------------------------------------------------------------------- front matter


def split_front_matter(text: str) -> tuple[dict[str, str | list[str]], str]:
    """A README's front matter and the Markdown below it.

    Of YAML only what such cards use is read: ``key: text`` and ``key:`` with ``- text`` lines; the rest is passed over.
    """
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return {}, text
    end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
    found: dict[str, str | list[str]] = {}
    key = ""
    for line in lines[1:end]:
        item, (name, colon, value) = line.strip(), line.partition(":")
        if item.startswith("- ") and key:
            items = found.setdefault(key, [])
            if isinstance(items, list):
                items.append(_unquoted(item[2:]))
        elif colon and name == name.strip() and name:
            key = name if not value.strip() else ""
            if value.strip() and value.strip()[0] not in "|>[{&*!":
                found[name] = _unquoted(value)
    return found, "\n".join(lines[end + 1 :])


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def front_matter(facts: ModelFacts) -> str:
    """YAML between two ``---``. JSON's strings and lists are YAML too, so that nothing needs quoting by hand."""
    entries = {
        "base_model": facts.base_model,
        "datasets": list(facts.datasets),
        "inference": False,
        "language": list(facts.language),
        "license": facts.license,
        "model_creator": facts.model_creator,
        "model_name": facts.model_name,
        "model_type": "llama",
        "prompt_template": get_template(facts.template).user,
        "quantized_by": facts.quantized_by,
    }
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items())
    return "\n".join(("---", *lines, "---", MARK))


# --------------------------------------------------------------------------------------------------------- the card


def model_card(facts: ModelFacts, files: Sequence[ProvidedFile]) -> str:
    """The whole card, Markdown."""
    sections = [
        front_matter(facts),
        _description(facts),
        _repositories(facts),
        _prompt(facts),
        _files(files),
        _downloading(facts, files),
        _python(facts, files),
        _compatibility(files),
    ]
    if facts.original_card:
        sections.append(f"# Original model card: {facts.model_name}\n\n{facts.original_card}")
    return "\n\n".join(sections) + "\n"


def _description(facts: ModelFacts) -> str:
    return f"""# {facts.model_name} - GPTQ

- Model creator: {facts.model_creator}
- Original model: {_original(facts, facts.model_name)}
- Quantised by: {facts.quantized_by}

## Description

GPTQ files of {facts.model_name}, made with tinygptq. There are several, each with other parameters and in a branch of its
own; the table below says how they differ, how large they are and who can load them."""


def _repositories(facts: ModelFacts) -> str:
    return f"""## Repositories available

- [GPTQ, for GPU and CPU: this repository]({HUB}/{facts.repo})
- {_original(facts, "The original, unquantised")}"""


def _original(facts: ModelFacts, text: str) -> str:
    """A link where the original is a repository; a folder of its maker's has no address."""
    return f"[{text}]({HUB}/{facts.base_model})" if "/" in facts.base_model else text


def _prompt(facts: ModelFacts) -> str:
    prompt = get_template(facts.template).user
    note = ""
    if prompt.endswith("\n"):
        last = prompt.strip("\n").rpartition("\n")[2]
        note = f"\n\nThe newline after `{last}` belongs to the prompt: the model was trained with it and does worse without."
    return f"## Prompt template: {facts.template.capitalize()}\n\n```\n{prompt}\n```{note}"


PARAMETERS = """- **Bits**: how many bits a quantised weight takes.
- **GS**: group size, the number of input features that share one scale. Smaller groups are more accurate and take more room;
  "none" is one group for all of them.
- **Act Order**: the columns are quantised in the order of their importance (`desc_act`). More accurate; some old loaders are
  slow with it or refuse it together with groups.
- **Damp %**: what is added to the Hessian's diagonal before it is inverted, as a share of its mean. 0.01 is customary.
- **GPTQ dataset**: the text that the model was calibrated on. It is not what the model was trained on.
- **Sequence Length**: tokens in each calibration window. It does not limit the length of prompts.
- **Perplexity**: of the quantised model, measured; lower is better, "-" is not measured.
- **ExLlama Compatibility**: whether ExLlama (v2) loads the file; it takes 4 bits only."""

COLUMNS = ("Branch", "Bits", "GS", "Act Order", "Damp %", "GPTQ Dataset", "Seq Len", "Size", "Perplexity", "ExLlama")


def _files(files: Sequence[ProvidedFile]) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_row, files)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(dict.fromkeys(_measured(file.meta["perplexity"]) for file in files if file.meta.get("perplexity")))
    parts = ["## Provided files, and GPTQ parameters", "### Explanation of GPTQ parameters", PARAMETERS, "### Files", table]
    return "\n\n".join([*parts, notes] if notes else parts)


def _row(file: ProvidedFile) -> tuple[str, ...]:
    quantization, perplexity = file.quantization, file.meta.get("perplexity")
    return (
        f"`{file.branch}`",
        str(quantization.bits),
        "none" if quantization.group_size == -1 else str(quantization.group_size),
        "Yes" if quantization.desc_act else "No",
        str(quantization.damp_percent),
        str(file.meta.get("dataset", "-")),
        str(file.meta.get("seqlen", "-")),
        readable_size(file.size),
        f"{perplexity['perplexity']:.3f}" if perplexity else "-",
        "Yes" if file.exllama else "No",
    )


def readable_size(size: int) -> str:
    """Decimal units, as disks and download pages count: 3,893,902,344 bytes are 3.89 GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _measured(perplexity: dict[str, Any]) -> str:
    beside = f" The unquantised model has {perplexity['unquantised']:.3f}." if "unquantised" in perplexity else ""
    return (
        f"Perplexity is over {perplexity['tokens']:,} tokens of {perplexity['dataset']}, in windows of "
        f"{perplexity['seqlen']}, on the CPU.{beside}"
    )


def _downloading(facts: ModelFacts, files: Sequence[ProvidedFile]) -> str:
    branch = files[min(1, len(files) - 1)].branch
    return f"""## How to download, including from branches

Where a name of the form `repository:branch` is understood (tinygptq, text-generation-webui), append the branch:
`{facts.repo}:{branch}`. Without one it is `main`.

With `huggingface-cli` (`pip install huggingface-hub`; newer versions call it `hf`):

```sh
huggingface-cli download {facts.repo} --revision {branch} --local-dir {facts.repo.rpartition("/")[2]}
```

With git (and git-lfs; it needs twice the room, because git keeps a copy):

```sh
git clone --single-branch --branch {branch} {HUB}/{facts.repo}
```"""


def _python(facts: ModelFacts, files: Sequence[ProvidedFile]) -> str:
    template = json.dumps(get_template(facts.template).user)
    return f"""## How to use from Python

With tinygptq (`pip install "tinygptq[hf]"`), on a CPU:

```python
import tinygptq

model = tinygptq.load("{facts.repo}:{files[0].branch}")
prompt = {template}.format(prompt="Tell me about AI")
for piece in model.stream(prompt, max_new_tokens=512, temperature=0.7, top_k=40, top_p=0.95, repetition_penalty=1.1):
    print(piece, end="", flush=True)
```

With transformers (`pip install transformers optimum gptqmodel`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, branch = "{facts.repo}", "{files[0].branch}"
tokenizer = AutoTokenizer.from_pretrained(repo, revision=branch)
model = AutoModelForCausalLM.from_pretrained(repo, revision=branch, device_map="auto")
prompt = {template}.format(prompt="Tell me about AI")
ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
print(tokenizer.decode(model.generate(ids, max_new_tokens=512, do_sample=True, temperature=0.7, top_k=40, top_p=0.95)[0]))
```"""


def _compatibility(files: Sequence[ProvidedFile]) -> str:
    """Who loads which branch, a row for each; below, the reasons against and what else there is to know."""
    names = list(files[0].loaders)
    rows = [("Branch", *names), ("---",) * (len(names) + 1)]
    rows += [(f"`{file.branch}`", *("No" if file.loaders[name] else "Yes" for name in names)) for file in files]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = "The format is AutoGPTQ's. tinygptq loads all of the branches; what else does, as `tinygptq inspect` found:"
    told = [{name: "; ".join(reasons) for name, reasons in file.loaders.items() if reasons} for file in files]
    notes = [*_grouped(files, told), *_grouped(files, [file.remarks for file in files])]
    return "\n\n".join(["## Compatibility", text, table, *(["\n".join(notes)] if notes else [])])


def _grouped(files: Sequence[ProvidedFile], told: Sequence[dict[str, str]]) -> list[str]:
    """One line for what is said of the same branches by the same words: ``- loaders (branches): words``."""
    branches: dict[tuple[str, str], list[str]] = {}  # (loader, words) -> branches
    for file, said in zip(files, told, strict=True):
        for loader, words in said.items():
            branches.setdefault((loader, words), []).append(f"`{file.branch}`")
    loaders: dict[tuple[str, str], list[str]] = {}  # (branches, words) -> loaders
    for (loader, words), where in branches.items():
        loaders.setdefault(("all branches" if len(where) == len(files) else ", ".join(where), words), []).append(loader)
    return [f"- {', '.join(who)} ({where}): {words}." for (where, words), who in loaders.items()]
