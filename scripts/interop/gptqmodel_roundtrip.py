"""Do folders made here load in GPTQModel and transformers, and folders made there load here, with the same numbers?

    python3.11 -m venv interop && interop/bin/pip install gptqmodel==7.7.0 torch==2.14.1 optimum==2.3.0 -e .
    interop/bin/python scripts/interop/gptqmodel_roundtrip.py [--json FOUND.json] [--fixtures FOLDER] [--only TEXT ...]

An environment of its own (6 GB: PyPI's torch is the CUDA build; none is needed, all runs on a CPU), because GPTQModel pins
versions that the tests do not use. Nothing is downloaded: the models are random LLaMAs written here.

Three directions, for each case below: quantised here and loaded there; quantised there and loaded here; either, loaded
through transformers' AutoModelForCausalLM with optimum. Three comparisons, of what the peer holds with what tinygptq reads:

- every linear's dequantised weights, bit for bit in fp16;
- logits of the peer in float32 (its modules, converted): equal but for the order of sums;
- logits of the peer as it runs, in fp16: half-precision rounding.

What it found is in tests/golden/gptqmodel/found.json (``--json``). ``--fixtures tests/golden/gptqmodel`` writes small ones,
as each tool wrote them, with the peer's weights (as CRC-32) and logits: tests/golden/test_gptqmodel_fixtures.py holds the
reader to them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute and changes nothing
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7.0 stops on two cores: its loader wants two of one worker

import gptqmodel
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tinygptq
from tinygptq.branches import BRANCHES
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.packing import PackedLinear

WIDTHS = dict(hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
SHORT = WIDTHS | dict(intermediate_size=416)  # 3.25 groups of 128, 6.5 of 64: the last group is short
SMALL = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
# all sizes are multiples of 32, so that 3 bits pack

Here, There = tinygptq.QuantizeConfig, dict[str, Any]
CASES: dict[str, Here | There] = {
    **{f"here {name}": config for name, config in BRANCHES.items()},
    "here 2-bit 64g": Here(2, 64),
    "here 3-bit 128g": Here(3, 128),
    "here 3-bit 32g act-order": Here(3, 32, desc_act=True),
    "here 4-bit 64g static groups": Here(4, 64, desc_act=True, static_groups=True),
    "here 4-bit 128g asymmetric": Here(4, 128, sym=False),
    "here 4-bit 64g asymmetric gptq_v2": Here(4, 64, sym=False, desc_act=True, checkpoint_format="gptq_v2"),
    "here 4-bit 128g, short group": Here(4, 128),
    "here 4-bit 64g act-order, short group": Here(4, 64, desc_act=True),
    "there default": dict(bits=4, group_size=128),  # its default is group-aware reordering
    "there group-aware 32g": dict(bits=4, group_size=32, act_group_aware=True),
    "there in order 128g": dict(bits=4, group_size=128, act_group_aware=False),
    "there act-order 32g": dict(bits=4, group_size=32, desc_act=True, act_group_aware=False),
    "there static groups 64g": dict(bits=4, group_size=64, desc_act=True, act_group_aware=False, static_groups=True),
    "there 8-bit act-order no groups": dict(bits=8, group_size=-1, desc_act=True, act_group_aware=False),
    "there gptq_v2 64g": dict(bits=4, group_size=64, format="gptq_v2"),
    "there gptq_v2 asymmetric 64g": dict(bits=4, group_size=64, format="gptq_v2", sym=False),
    "there asymmetric 32g": dict(bits=4, group_size=32, sym=False),
    "there 2-bit asymmetric 32g": dict(bits=2, group_size=32, sym=False),
    "there 3-bit 128g": dict(bits=3, group_size=128),
    "there 3-bit asymmetric 32g": dict(bits=3, group_size=32, sym=False),
    "there 8-bit 128g": dict(bits=8, group_size=128),
    "there bfloat16": dict(bits=4, group_size=32, dtype="bfloat16"),
    "there down_proj left out": dict(bits=4, group_size=32, dynamic={"-:.*down_proj": {}}),
    "there default, short group": dict(bits=4, group_size=128),
    "there act-order 64g, short group": dict(bits=4, group_size=64, desc_act=True, act_group_aware=False),
}  # fmt: skip
FIXTURES: dict[str, Here | There] = {
    "here_3bit_32g_act_order": Here(3, 32, desc_act=True),
    "here_4bit_64g_asymmetric_v2": Here(4, 64, sym=False, checkpoint_format="gptq_v2"),
    "there_4bit_16g_group_aware": dict(bits=4, group_size=16),
    "there_4bit_16g_act_order": dict(bits=4, group_size=16, desc_act=True, act_group_aware=False),
    "there_4bit_32g_static_groups": dict(bits=4, group_size=32, desc_act=True, act_group_aware=False, static_groups=True),
    "there_4bit_16g_asymmetric": dict(bits=4, group_size=16, sym=False),
    "there_4bit_16g_asymmetric_v2": dict(bits=4, group_size=16, sym=False, format="gptq_v2"),
    "there_3bit_64g": dict(bits=3, group_size=64),  # 96 = 1.5 groups
    "there_8bit_no_groups": dict(bits=8, group_size=-1, desc_act=True, act_group_aware=False),
}


def write_source(folder: Path, widths: dict[str, int], vocab_size: int, tied: bool) -> None:
    """A random LLaMA in fp16 whose activations stay near 1, and a tokenizer of lower-case letters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **widths, vocab_size=vocab_size, max_position_embeddings=128, tie_word_embeddings=tied, rms_norm_eps=1e-5
    )
    model = transformers.LlamaForCausalLM(config)
    for name, tensor in model.named_parameters():
        if name.endswith("norm.weight"):
            tensor.data = 1 + 0.2 * torch.randn_like(tensor)
        else:
            tensor.data = torch.randn_like(tensor) / (1 if "embed" in name and not tied else tensor.shape[1] ** 0.5)
        if "_proj" in name:  # some outputs without a negative weight: asymmetric zero points of 0
            tensor.data[::16] = tensor.data[::16].abs()
    model.half().save_pretrained(folder)
    letters = ["<unk>", "<s>", "</s>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    text = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz "), 4096))
    (folder / "calibration.txt").write_text(text)


def quantise(source: Path, out: Path, how: Here | There) -> None:
    """Quantise there if ``how`` is a dict, here otherwise; 16 windows of 64 tokens."""
    if not isinstance(how, dict):
        tinygptq.quantize(source, out, how, dataset=str(source / "calibration.txt"), nsamples=16, seqlen=64)
        return
    settings = {"offload_to_disk": False, **how}  # else the folder names a temporary one
    dtype = getattr(torch, settings.pop("dtype", "float16"))
    config = gptqmodel.QuantizeConfig(**settings)
    config.device = "cpu"
    model = gptqmodel.GPTQModel.load(str(source), config, dtype=dtype)
    size = model.model.config.vocab_size
    windows = np.random.default_rng(0).integers(3, size, (16, 1, 64))
    ones = torch.ones(1, windows.shape[-1], dtype=torch.long)
    model.quantize([{"input_ids": torch.tensor(window), "attention_mask": ones} for window in windows])
    model.save(str(out))


def load_gptqmodel(folder: Path) -> torch.nn.Module:
    backend = gptqmodel.BACKEND.TORCH
    return gptqmodel.GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model


def load_transformers(folder: Path, backend: str | None = None) -> torch.nn.Module:
    """``backend``: which of GPTQModel's kernels; None leaves the choice to it."""
    how: dict[str, Any] = {"dtype": torch.float16, "device_map": "cpu"}
    if backend is not None:
        how["quantization_config"] = transformers.GPTQConfig(bits=4, backend=backend)  # all but backend is the folder's
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how)


@torch.inference_mode()
def look(model: torch.nn.Module, ids: np.ndarray) -> dict[str, Any]:
    """What a peer's model holds and says: fp16 weights [in, out] of each linear, logits [B, T, vocab] in half and single."""
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    weights = {name: module.dequantize_weight().half().numpy() for name, module in linears.items()}
    widened = torch.nn.Module.float(copy.deepcopy(model))  # transformers forbids model.float() for quantised ones
    single = widened(torch.tensor(ids)).logits.numpy()
    half = model(torch.tensor(ids)).logits.half().numpy()
    kernels = sorted({type(module).__name__ for module in linears.values()})
    return {"weights": weights, "half": half, "single": single, "kernels": kernels}


def compare(folder: Path, seen: dict[str, Any], ids: np.ndarray) -> dict[str, Any]:
    """How far the peer's view of a folder is from tinygptq's."""
    weights = load_checkpoint(folder).weights
    packed = {name: linear.dequantize() for name, linear in weights.linears.items() if isinstance(linear, PackedLinear)}
    ours = tinygptq.load(folder).forward(ids)
    halves = {name: weight.astype(np.float16) for name, weight in packed.items()}  # each (in, out)
    names = sorted(seen["weights"].keys() | packed.keys())
    unequal = [name for name in names if not np.array_equal(seen["weights"].get(name, 0), halves.get(name, 1))]
    found: dict[str, Any] = {"kernel": " ".join(seen["kernels"]), "linears": len(names), "unequal": unequal}
    for precision in ("single", "half"):
        difference = seen[precision].astype(np.float32) - ours
        found[f"{precision}_max"] = float(np.abs(difference).max())
        found[f"{precision}_relative"] = float(np.linalg.norm(difference) / np.linalg.norm(ours))
    return found


def run(case: str, how: Here | There, source: Path, work: Path, ids: np.ndarray) -> dict[str, dict[str, Any]]:
    """One case through both peers; ``refused`` is what a peer says that does not load it.

    Where the kernel that transformers is given by default refuses, its plain one is asked as well.
    """
    folder, found = work / case.replace(" ", "_"), {}
    quantise(source, folder, how)
    loaders = {
        "gptqmodel": load_gptqmodel,
        "transformers": load_transformers,
        "transformers, plain": lambda folder: load_transformers(folder, "torch"),
    }
    for peer, load in loaders.items():
        if peer == "transformers, plain" and "refused" not in found["transformers"]:
            continue
        try:
            seen = look(load(folder), ids)
        except (ValueError, RuntimeError, IndexError) as error:  # IndexError: g_idx of memory that nothing was read into
            found[peer] = {"refused": str(error).splitlines()[0]}
            continue
        found[peer] = compare(folder, seen, ids)
    return found


def write_fixture(case: str, how: Here | There, source: Path, folder: Path, ids: np.ndarray) -> None:
    """A folder as it was written, with what GPTQModel makes of it in ``expected.npz``."""
    with tempfile.TemporaryDirectory() as work:
        quantise(source, Path(work) / case, how)
        seen = look(load_gptqmodel(Path(work) / case), ids)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "quantize_config.json", "model.safetensors"):
            shutil.copyfile(Path(work) / case / name, folder / name)
    names = sorted(seen["weights"])
    checksums = np.array([zlib.crc32(np.ascontiguousarray(seen["weights"][name])) for name in names], np.uint32)
    expected = {"ids": ids, "half": seen["half"], "single": seen["single"], "linears": np.array(names), "crc32": checksums}
    np.savez_compressed(folder / "expected.npz", **expected)


def print_rows(case: str, peers: dict[str, dict[str, Any]]) -> None:
    """One line for each peer."""
    for peer, row in peers.items():
        if "refused" in row:
            print(f"{case:38} {peer:20} refused: {row['refused']}", flush=True)
            continue
        equal = f"{row['linears'] - len(row['unequal'])}/{row['linears']}"
        single = f"{row['single_max']:10.1e} {row['single_relative']:8.1e}"
        half = f"{row['half_max']:8.4f} {row['half_relative']:8.5f}"
        print(f"{case:38} {peer:20} {row['kernel']:16} {equal:>7} {single} {half}", flush=True)


def save(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Write what was found, in the order of CASES; cases of an earlier run of the same versions stay."""
    packages = ("gptqmodel", "transformers", "optimum", "torch", "tinygptq")
    versions = {name: version(name) for name in packages}
    earlier = json.loads(path.read_text()) if path.exists() else {}
    every = {**(earlier["cases"] if earlier.get("versions") == versions else {}), **found}
    facts = {"versions": versions, "device": "cpu", "cases": {case: every[case] for case in CASES if case in every}}
    path.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was found, keeping what the file says of other cases")
    parser.add_argument("--fixtures", type=Path, help="write small folders and the peer's logits instead")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases whose names begin with it")
    args = parser.parse_args()
    torch.set_num_threads(2)
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if args.fixtures:
            write_source(work / "source", SMALL, vocab_size=64, tied=True)
            for case, how in FIXTURES.items():
                ids = rng.integers(3, 64, (1, 8))
                if case.startswith(tuple(args.only)):
                    write_fixture(case, how, work / "source", args.fixtures / case, ids)
            return 0
        write_source(work / "source", WIDTHS, vocab_size=320, tied=False)
        write_source(work / "short", SHORT, vocab_size=320, tied=False)
        ids, found = rng.integers(3, 320, (2, 48)), {}
        head = f"{'single max':>10} {'rel.':>8} {'half max':>8} {'rel.':>8}"
        print(f"{'case':38} {'peer':20} {'kernel':16} {'weights':>7} {head}")
        for case, how in CASES.items():
            if case.startswith(tuple(args.only)):
                found[case] = run(case, how, work / ("short" if "short" in case else "source"), work, ids)
                print_rows(case, found[case])
                if args.json:
                    save(args.json, found)
    return int(any(row.get("unequal") for peers in found.values() for row in peers.values()))


if __name__ == "__main__":
    raise SystemExit(main())
