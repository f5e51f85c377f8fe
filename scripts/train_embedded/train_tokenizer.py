"""Step 3: a sentencepiece tokenizer with LLaMA's conventions.

    python train_tokenizer.py TEXT_DIR ASSETS_DIR --vocab-size 2048

BPE with byte fallback, <unk>=0, <s>=1, </s>=2, digits one by one, no normalisation, a space put before the text.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import sentencepiece as spm


def train(text: Path, out: Path, vocab_size: int, sentences: int) -> None:
    """Writes tokenizer.model and tokenizer_config.json into ``out``; ``text`` has one story a line."""
    model = io.BytesIO()  # not model_prefix: the file would record where it was written
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_surface=" \u2047 ",
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentence_length=8192,
        input_sentence_size=sentences,
        shuffle_input_sentence=True,
        num_threads=2,
        minloglevel=1,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("text", type=Path)
    ap.add_argument("assets", type=Path)
    ap.add_argument("--vocab-size", type=int, default=2048)
    ap.add_argument("--sentences", type=int, default=15000, help="stories read, drawn at random")
    a = ap.parse_args()
    a.assets.mkdir(parents=True, exist_ok=True)
    train(a.text / "train.txt", a.assets, a.vocab_size, a.sentences)
    sp = spm.SentencePieceProcessor(model_file=str(a.assets / "tokenizer.model"))
    held = (a.text / "valid.txt").read_text(encoding="utf-8")
    print(f"{sp.vocab_size()} pieces, {len(held) / len(sp.encode(held)):.2f} characters a token on valid.txt")


if __name__ == "__main__":
    main()
