"""Models by name: against a small hub of our own, through huggingface_hub in a process of its own (it reads its variables
when imported)."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_llama_folder, save_byte_tokenizer
from small_hub import Repo, SmallHub, branch_of_folder

from tinygptq.errors import TinyGPTQError
from tinygptq.release.hub import model_name, resolve

ROOT = Path(__file__).resolve().parents[2]
needs_client = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="huggingface_hub is not installed")
NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"}
REFUSED = {"pytorch_model.bin", "model.gguf", "original/consolidated.safetensors", "training_args.bin", ".gitattributes"}

CODE = """
import sys
from pathlib import Path
from tinygptq.errors import TinyGPTQError
from tinygptq.release.hub import resolve
try:
    folder = resolve(sys.argv[1], *sys.argv[2:])
    print(folder)
    print(*sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
except TinyGPTQError as error:
    print("ERROR", error)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    random_llama_folder(folder, vocab_size=260, num_hidden_layers=1)
    save_byte_tokenizer(folder)
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("# A model\n")
    return folder


@pytest.fixture
def hub(model):
    main = branch_of_folder(model, **{name: name.encode() for name in REFUSED})
    branches = {"main": main, "four-bits": {**main, "README.md": b"# Four bits\n"}}
    pickles = {"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}
    repos = {
        "someone/model": Repo(branches),
        "someone/gated": Repo(branches, token="hf_good", gated=True),
        "someone/private": Repo(branches, token="hf_good"),
        "someone/pickles": Repo(pickles),
    }
    with SmallHub(repos) as server:
        yield server


@pytest.fixture
def ask(hub, tmp_path):
    """Run ``resolve`` in a process of its own against the small hub; returns (stdout, stderr)."""

    def run(*words: str, code: str = CODE, **environment: str) -> tuple[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_PROXY"))}
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost",
                    "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env={**clean, **settings},
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    return run


# --------------------------------------------------------------------------------------------------------- downloading


@needs_client
def test_only_the_needed_files_come_and_only_once(hub, ask, model):
    out, err = ask("someone/model")
    folder, names = out.splitlines()
    assert set(names.split()) == NEEDED
    assert sorted(hub.downloads()) == sorted(NEEDED)
    assert all((Path(folder) / name).read_bytes() == (model / name).read_bytes() for name in NEEDED)
    assert err == ""  # no terminal, no progress
    hub.requests.clear()
    assert ask("someone/model") == (out, "")
    assert hub.downloads() == []


@needs_client
@pytest.mark.parametrize("words", [("someone/model:four-bits",), ("someone/model", "four-bits")])
def test_a_branch_by_either_spelling(ask, words):
    folder = ask(*words)[0].splitlines()[0]
    assert (Path(folder) / "README.md").read_text() == "# Four bits\n"


@needs_client
def test_configs_alone(hub, ask):
    code = CODE.replace("*sys.argv[2:]", "weights=False")
    assert set(ask("someone/model", code=code)[0].splitlines()[1].split()) == NEEDED - {"model.safetensors"}
    assert "model.safetensors" not in hub.downloads()


@needs_client
def test_a_broken_download_goes_on_where_it_broke(hub, ask, model):
    weights = bytes(range(256)) * (24 << 12)  # 24 MiB: huggingface_hub writes, and so resumes, 10 MiB at a time
    hub.repos["someone/model"].branches["main"]["model.safetensors"] = weights
    hub.break_after = 15 << 20
    out, err = ask("someone/model")
    if out.startswith("ERROR someone/model: the download failed ("):  # old clients give up, and go on when asked again
        out, err = ask("someone/model")
    asked = [span for method, path, span in hub.requests if method == "GET" and path.endswith("/model.safetensors")]
    assert len(asked) == 2
    assert asked[0] is None
    assert 0 < int(asked[1].removeprefix("bytes=").removesuffix("-")) <= 15 << 20
    assert (Path(out.splitlines()[0]) / "model.safetensors").read_bytes() == weights
    assert err == ""


@needs_client
def test_offline_the_cache_is_enough(hub, ask):
    out, _ = ask("someone/model")
    hub.requests.clear()
    assert ask("someone/model", HF_HUB_OFFLINE="1") == (out, "")
    assert hub.requests == []
    error = ask("someone/model:four-bits", HF_HUB_OFFLINE="1")[0]
    assert error.startswith("ERROR someone/model:four-bits: no such folder, and not complete in the cache; HF_HUB_OFFLINE")


@needs_client
def test_without_a_network_the_cache_is_enough(ask):
    out, _ = ask("someone/model")
    assert ask("someone/model", HF_ENDPOINT=nowhere()) == (out, "")


@needs_client
def test_a_token_opens_what_is_gated_or_private(ask):
    for repo in ("someone/gated", "someone/private"):
        assert set(ask(repo, HF_TOKEN="hf_good")[0].splitlines()[1].split()) == NEEDED


@needs_client
def test_the_command_line_takes_a_repository(ask, tmp_path):
    code = "import sys\nfrom tinygptq.cli import main\nsys.exit(main())"
    words = ("--method", "rtn", "--group-size", "32")
    ask("quantize", "someone/model", "out", "--revision", "four-bits", *words, code=code)
    noted = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert noted["model_name_or_path"] == "someone/model"  # not the commit that the cache's folder is named after
    assert (tmp_path / "out" / "tokenizer.json").is_file()


# --------------------------------------------------------------------------------------------------------- mistakes


def nowhere() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@needs_client
@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (("someone/nothing",), {}, "someone/nothing: no such folder, and no such repository at {hub} (a private one"),
        (("someone/private",), {}, "someone/private: no such folder, and no such repository at {hub} (a private"),
        (("someone/model:eight",), {}, "someone/model: no branch 'eight'; it has four-bits, main"),
        (("someone/gated",), {}, "someone/gated: the repository is gated; accept its terms at {hub}/someone/gated and"),
        (("someone/gated",), {"HF_TOKEN": "hf_bad"}, "someone/gated: {hub} refuses the token; set HF_TOKEN to a valid one"),
        (("someone/pickles",), {}, "someone/pickles: the repository holds no .safetensors file at main; PyTorch pickles"),
        (("someone/..",), {}, "someone/..: the download failed (HFValidationError: "),
    ],
)
def test_a_mistake_is_one_line(ask, hub, words, environment, expected):
    out, err = ask(*words, **environment)
    assert out.startswith("ERROR " + expected.format(hub=hub.endpoint))
    assert len(out.splitlines()) == 1
    assert err == ""


@needs_client
def test_no_network_is_one_line_that_names_the_folder_alternative(ask):
    address = nowhere()
    out, err = ask("someone/model", HF_ENDPOINT=address)
    assert out.startswith(f"ERROR someone/model: no such folder, and {address} cannot be reached (")
    assert out.endswith("); give a folder instead")
    assert err == ""


@needs_client
def test_a_hub_in_trouble_is_one_line(ask, hub):
    hub.failing = 503
    out, err = ask("someone/model")
    assert out == f"ERROR someone/model: {hub.endpoint} answers with status 503; try later, or give a folder"
    assert err == ""


def test_without_the_client_a_folder_still_loads(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it raises ImportError
    assert resolve(model) == model
    with pytest.raises(TinyGPTQError, match=r"someone/model: no such folder; .* pip install tinygptq\[hf\]"):
        resolve("someone/model")


@pytest.mark.parametrize("source", ["./missing", "/missing/folder", "~/missing", "..\\missing", "C:\\models\\tulu"])
def test_what_looks_like_a_path_is_one(source):
    with pytest.raises(TinyGPTQError, match=r"no such folder$"):
        resolve(source)


def test_what_is_no_repository_says_what_one_would_be():
    for source in ("missing", "a/b/c", "missing:main", "a b/c", ""):
        with pytest.raises(TinyGPTQError, match=r"no such folder or file \(a repository would be OWNER/NAME"):
            resolve(source) if source else resolve("x")
    with pytest.raises(TinyGPTQError, match=r"no such folder$"):
        resolve(Path("someone/model"))  # a Path means a folder


def test_branches_belong_to_repositories(model, monkeypatch):
    with pytest.raises(TinyGPTQError, match="is a folder; --revision main"):
        resolve(model, "main")
    monkeypatch.chdir(model.parent.parent)
    with pytest.raises(TinyGPTQError, match="is a folder; ':main'"):
        resolve(f"{model.parent.name}/model:main")
    with pytest.raises(TinyGPTQError, match="--revision other contradicts ':main'"):
        resolve("someone/model:main", "other")


def test_a_clone_without_its_large_files(model, tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    for path in model.iterdir():
        (clone / path.name).write_bytes(path.read_bytes())
    assert resolve(str(clone)) == clone
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    (clone / "model.safetensors").write_bytes(pointer)
    with pytest.raises(TinyGPTQError, match=r"model\.safetensors: is a git-lfs pointer.*`git lfs pull` in "):
        resolve(clone)


def test_the_name_of_a_model(tmp_path):
    snapshot = tmp_path / "models--someone--a--model" / "snapshots" / ("0" * 40)
    assert model_name(snapshot) == "someone/a--model"
    assert model_name(tmp_path / "tulu-7b") == "tulu-7b"
