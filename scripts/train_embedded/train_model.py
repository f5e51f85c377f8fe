"""Step 4: train the model and write it as a Hugging Face folder.

    python train_model.py TEXT_DIR ASSETS_DIR --seconds 75

A LLaMA of 2.4 million parameters with grouped-query attention and tied embeddings. Most stories are seen as
``<s> story </s>``; one in six lies in a stream of plain text with blank lines in between, so that the model also knows
text files. The learning rate follows the clock: warm-up, then a cosine to zero at --seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
    "use_cache": True,
}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.95}


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions in the half-split form."""

    def __init__(self, c: dict):
        super().__init__()
        h, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        self.head_dim = c["head_dim"]
        self.q_proj, self.k_proj = (
            nn.Linear(c["hidden_size"], h, bias=False),
            nn.Linear(c["hidden_size"], kv, bias=False),
        )
        self.v_proj, self.o_proj = (
            nn.Linear(c["hidden_size"], kv, bias=False),
            nn.Linear(h, c["hidden_size"], bias=False),
        )

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        # q (B, H, T, D); k, v (B, KV, T, D)

        def rope(y: torch.Tensor) -> torch.Tensor:
            a, z = y.chunk(2, dim=-1)
            return (y * cos + torch.cat([-z, a], dim=-1) * sin).to(v.dtype)

        groups = q.shape[1] // k.shape[1]
        k, v = rope(k).repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(rope(q), k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: dict):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each after a norm and beside a residual."""

    def __init__(self, c: dict):
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(c["hidden_size"], c["rms_norm_eps"]), Attention(c)
        self.post_attention_layernorm, self.mlp = Norm(c["hidden_size"], c["rms_norm_eps"]), MLP(c)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Parameter names are those of a Hugging Face checkpoint, less the ``model.`` in front."""

    def __init__(self, c: dict):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        freqs = c["rope_theta"] ** (-torch.arange(0, c["head_dim"], 2).float() / c["head_dim"])
        angles = torch.outer(torch.arange(c["max_position_embeddings"]).float(), freqs).repeat(1, 2)  # (T, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    p, std=0.02 if "embed" in name else 0.04 / (math.sqrt(2 * c["num_hidden_layers"]) if deep else 1)
                )

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of targets [B, T] after ids [B, T]."""
        x, t = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        logits = F.linear(self.norm(x), self.embed_tokens.weight)  # (B, T, V)
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))


class Stories:
    """Tokenised stories, laid out anew for every epoch."""

    def __init__(self, sp: spm.SentencePieceProcessor, path: Path):
        lines = path.read_text(encoding="utf-8").splitlines()
        alone = [[1, *ids, 2] for ids in sp.encode(lines)]
        inside = [ids[1:] for ids in sp.encode(["\n\n" + s for s in lines])]  # less the space put before the text
        self.alone, self.inside = ([np.array(x, np.int64) for x in part] for part in (alone, inside))

    def rows(self, length: int, in_file: float, rng: np.random.Generator) -> np.ndarray:
        """int64 [rows, length + 1]: the stories in random order, a share ``in_file`` as a text file has them."""
        order = rng.permutation(len(self.alone))
        cut = round(in_file * len(order))
        streams = []
        for chosen in ([self.inside[i] for i in order[:cut]], [self.alone[i] for i in order[cut:]]):
            if chosen:
                flat = np.concatenate(chosen)
                n = (len(flat) - 1) // length
                streams.append(np.lib.stride_tricks.sliding_window_view(flat, length + 1)[: n * length : length])
        rows = np.concatenate(streams)
        return rows[rng.permutation(len(rows))]


@torch.no_grad()
def loss_on(model: nn.Module, rows: torch.Tensor, batch: int = 64) -> float:
    """Mean loss over all tokens of rows [N, T + 1], in the weights' own precision."""
    model.eval()
    losses = [model(r[:, :-1], r[:, 1:]).double() * len(r) for r in rows.split(batch)]
    model.train()
    return float(sum(losses) / len(rows))


def export(model: Llama, out: Path) -> None:
    """config.json, generation_config.json and model.safetensors in fp16."""
    state = {f"model.{k}": v.detach().to("cpu", torch.float16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n", encoding="utf-8")


def optimizer_for(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; the norms do not decay."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8, fused=True)


def fit(model: Llama, stories: Stories, valid: torch.Tensor, a: argparse.Namespace) -> None:
    """Trains in place for ``a.seconds``; prints the validation loss some twenty times."""
    rng, dev = np.random.default_rng(a.seed), a.device
    opt = optimizer_for(model, a.lr, a.weight_decay)
    step_model = torch.compile(model) if dev == "cuda" else model
    began, step, epoch, report = time.monotonic(), 0, 0, 0.0
    while (done := (time.monotonic() - began) / a.seconds) < 1:
        rows = torch.from_numpy(stories.rows(a.length, a.in_file, rng)).to(dev)
        for batch in rows.split(a.batch):
            if len(batch) < a.batch and step:
                continue  # one shape, one compilation
            done = min(1.0, (time.monotonic() - began) / a.seconds)
            lr = a.lr * min(1.0, (step + 1) / a.warmup) * 0.5 * (1 + math.cos(math.pi * done))
            for group in opt.param_groups:
                group["lr"] = lr
            with torch.autocast(dev, torch.bfloat16, enabled=dev == "cuda"):
                loss = step_model(batch[:, :-1], batch[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            step += 1
            if step == 1:  # the compilation is not part of the schedule
                began = time.monotonic()
            if step % 20 == 0:
                loss.item()  # keeps the clock honest: no more than 20 steps are queued
            if done >= report:
                report += 0.05
                print(
                    f"{time.monotonic() - began:5.0f} s  epoch {epoch}  step {step}  train {loss.item():.4f}  "
                    f"valid {loss_on(model, valid):.4f}",
                    flush=True,
                )
            if done >= 1:
                break
        epoch += 1


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("text", type=Path)
    ap.add_argument("assets", type=Path)
    ap.add_argument("--seconds", type=float, default=75)
    ap.add_argument("--batch", type=int, default=128)
    ap.add_argument("--length", type=int, default=CONFIG["max_position_embeddings"])
    ap.add_argument("--in-file", type=float, default=1 / 6)
    ap.add_argument("--lr", type=float, default=6e-3)
    ap.add_argument("--weight-decay", type=float, default=0.6)
    ap.add_argument("--warmup", type=int, default=200)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.parse_args()
    torch.manual_seed(a.seed)
    sp = spm.SentencePieceProcessor(model_file=str(a.assets / "tokenizer.model"))
    assert sp.vocab_size() == CONFIG["vocab_size"], "train the tokenizer with the vocabulary that CONFIG states"
    stories = Stories(sp, a.text / "train.txt")
    rng = np.random.default_rng(1)
    valid_stories = Stories(sp, a.text / "valid.txt")
    valid = torch.from_numpy(valid_stories.rows(a.length, 0.0, rng)).to(a.device)
    in_file = torch.from_numpy(valid_stories.rows(256, 1.0, rng)).to(a.device)
    model = Llama(CONFIG).to(a.device)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(map(len, stories.alone)):,} tokens",
        flush=True,
    )
    fit(model, stories, valid, a)
    fp32 = loss_on(model, valid)
    export(model, a.assets)
    for p in model.parameters():
        p.data = p.data.half().float()
    fp16, file_loss = loss_on(model, valid), loss_on(model, in_file)
    print(
        f"valid loss fp32 {fp32:.5f}, rounded to fp16 {fp16:.5f}, perplexity {math.exp(fp16):.3f}; "
        f"as a text file in windows of 256: perplexity {math.exp(file_loss):.3f}"
    )


if __name__ == "__main__":
    main()
