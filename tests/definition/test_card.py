"""The model card: front matter that YAML reads back, figures that are those of the files, and the original below."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import random_llama_folder, random_solutions, write_quantized

from tinygptq.branches import BRANCHES
from tinygptq.cli import main
from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.release.card import MARK, ModelFacts, model_card, provided_files, readable_size, split_front_matter
from tinygptq.release.facts import update_meta
from tinygptq.release.inspect_folder import inspect_folder
from tinygptq.templates import render

README = """---
license: apache-2.0
language:
- en
- de
datasets:
- databricks/databricks-dolly-15k
- "OpenAssistant/oasst1"
model_creator: 'Some One'
widget:
- text: hello
extra: {a: 1}
---

# Tulu, small

Trained on much.
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "tulu-small"
    random_llama_folder(folder)
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture(scope="module")
def branches(source, tmp_path_factory) -> Path:
    """Two branches; of the first, everything is noted, of the second nothing."""
    root = tmp_path_factory.mktemp("branches")
    for name in ("gptq-4bit-32g-actorder_True", "gptq-8bit--1g-actorder_True"):
        write_quantized(source, root / name, BRANCHES[name], random_solutions)
    measured = {"perplexity": 12.3456, "tokens": 4094, "windows": 2, "seqlen": 2048, "dataset": "held-out.txt"}
    update_meta(root / "gptq-4bit-32g-actorder_True", dataset="wikitext2", seqlen=2048, perplexity=measured)
    return root


def parsed_table(text: str) -> list[dict[str, str]]:
    """The first table of a text."""
    lines = text[text.index("| Branch") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def card_of(source: Path, branches: Path, **given: object) -> str:
    folders = sorted(branches.iterdir())
    return model_card(ModelFacts.of(source, **given), provided_files(folders))


def test_front_matter_is_yaml_with_the_facts(source, branches):
    yaml = pytest.importorskip("yaml")
    text = card_of(source, branches, base_model="allenai/tulu-7b", quantized_by="me", model_name='Tulu "7B": #1')
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "base_model": "allenai/tulu-7b",
        "datasets": ["databricks/databricks-dolly-15k", "OpenAssistant/oasst1"],
        "inference": False,
        "language": ["en", "de"],
        "license": "apache-2.0",
        "model_creator": "Some One",
        "model_name": 'Tulu "7B": #1',
        "model_type": "llama",
        "prompt_template": "<|user|>\n{prompt}\n<|assistant|>\n",
        "quantized_by": "me",
    }


def test_front_matter_of_the_original_is_read():
    stated, body = split_front_matter(README)
    assert stated["language"] == ["en", "de"]
    assert stated["datasets"] == ["databricks/databricks-dolly-15k", "OpenAssistant/oasst1"]
    assert stated["model_creator"] == "Some One"
    assert "extra" not in stated
    assert body.strip() == "# Tulu, small\n\nTrained on much."
    assert split_front_matter("# No front matter\n---\n") == ({}, "# No front matter\n---\n")
    assert split_front_matter("---\nnever closed: yes\n") == ({}, "---\nnever closed: yes\n")
    assert split_front_matter("") == ({}, "")


def test_what_is_not_known_has_a_default(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    facts = ModelFacts.of(bare, license=None, language=())
    assert (facts.base_model, facts.model_name, facts.model_creator) == ("bare", "bare", "unknown")
    assert (facts.license, facts.language, facts.datasets, facts.original_card) == ("other", ("en",), (), "")
    assert ModelFacts.of(bare, base_model="allenai/tulu-7b").model_creator == "allenai"


def test_the_table_has_the_measured_figures(source, branches):
    four, eight = parsed_table(card_of(source, branches))
    size = (branches / "gptq-4bit-32g-actorder_True" / "model.safetensors").stat().st_size
    assert four == {
        "Branch": "`gptq-4bit-32g-actorder_True`", "Bits": "4", "GS": "32", "Act Order": "Yes", "Damp %": "0.01",
        "GPTQ Dataset": "wikitext2", "Seq Len": "2048", "Size": f"{size / 1e6:.2f} MB", "Perplexity": "12.346",
        "ExLlama": "Yes",
    }  # fmt: skip
    assert (eight["Bits"], eight["GS"], eight["Act Order"], eight["ExLlama"]) == ("8", "none", "Yes", "No")
    assert (eight["GPTQ Dataset"], eight["Seq Len"], eight["Perplexity"]) == ("-", "-", "-")


def test_every_section_is_there(source, branches):
    text = card_of(source, branches, repo="me/tulu-GPTQ")
    headings = [line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#")]
    expected = ["tulu-small - GPTQ", "Description", "Repositories available", "Prompt template: Tulu",
                "Provided files, and GPTQ parameters", "Explanation of GPTQ parameters", "Files",
                "How to download, including from branches", "How to use from Python", "Compatibility",
                "Original model card: tulu-small", "Tulu, small"]  # fmt: skip
    assert headings == expected
    assert MARK in text
    assert "```\n<|user|>\n{prompt}\n<|assistant|>\n\n```" in text  # with the newline that matters
    assert "The newline after `<|assistant|>` belongs to the prompt" in text
    assert "over 4,094 tokens of held-out.txt, in windows of 2048" in text
    assert "me/tulu-GPTQ:gptq-" in text
    assert "git clone --single-branch --branch gptq-" in text
    assert text.endswith("Trained on much.\n")


def test_the_python_of_the_card_runs_as_far_as_names_go(source, branches):
    text = card_of(source, branches)
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")
        line = next(line for line in block.splitlines() if line.startswith("prompt = "))
        names: dict[str, str] = {}
        exec(line, names)
        assert names["prompt"] == render("tulu", "Tell me about AI")


def test_compatibility_is_what_inspect_finds(source, branches):
    text = card_of(source, branches).split("## Compatibility")[1].split("# Original")[0]
    four, eight = parsed_table(text)
    for name, row in (("gptq-4bit-32g-actorder_True", four), ("gptq-8bit--1g-actorder_True", eight)):
        found = inspect_folder(branches / name)
        assert {loader: cell == "Yes" for loader, cell in row.items() if loader != "Branch"} == {
            loader: not reasons for loader, reasons in found.loaders.items()
        }
        for loader, reasons in found.loaders.items():
            for reason in reasons:
                assert any(line.startswith("- ") and loader in line and reason in line for line in text.splitlines())
        assert all(remark in text for remark in found.remarks.values())
    assert four["ExLlama v2"] == "Yes"
    assert eight["ExLlama v2"] == "No"
    assert "- ExLlama v1, ExLlama v2 (`gptq-8bit--1g-actorder_True`): 8 bits; it has 4." in text


def test_sizes_are_decimal():
    assert readable_size(3_893_986_888) == "3.89 GB"
    assert readable_size(123_456_789) == "0.12 GB"
    assert readable_size(1_234_567) == "1.23 MB"


def test_the_card_command(source, branches, tmp_path, capsys):
    folders = sorted(branches.iterdir())
    words = ["card", *map(str, folders), "--source", str(source), "--repo", "me/tulu-GPTQ"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed == card_of(source, branches, repo="me/tulu-GPTQ", template="tulu")
    assert main([*words, "--out", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text() == printed
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_one_folder_of_any_name_is_main(source, tmp_path):
    write_quantized(source, tmp_path / "mine", QuantizeConfig(group_size=32), random_solutions)
    assert [file.branch for file in provided_files([tmp_path / "mine"])] == ["main"]
    (tmp_path / "mine" / "quantize_config.json").unlink()  # config.json says it too, and meta is not needed
    assert provided_files([tmp_path / "mine"])[0].quantization.group_size == 32


def test_mistakes_of_the_card_command(source, branches, tmp_path, capsys):
    folder = str(next(branches.iterdir()))
    for words, part in (
        ([str(tmp_path / "nothing")], "nothing: no such folder"),
        ([str(source)], "is not quantised"),
        ([folder, "--source", str(tmp_path / "nothing")], "nothing: no such folder"),
        ([folder, "--out", str(tmp_path / "no" / "README.md")], "README.md: cannot be written"),
    ):
        assert main(["card", *words]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert part in err


def test_a_folder_without_weights_has_no_size(source, tmp_path):
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps(QuantizeConfig().to_dict()))
    with pytest.raises(TinyGPTQError, match=r"no \.safetensors file"):
        provided_files([tmp_path])
