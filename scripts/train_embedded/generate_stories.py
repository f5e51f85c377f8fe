"""Step 1: let an Apache-2.0 language model write the training text.

    python generate_stories.py MODEL_DIR stories.txt.gz --seconds 330

MODEL_DIR is SmolLM2-135M-Instruct as a Hugging Face folder (scripts/fetch_smollm2.py writes one). The script is a
batched generator in plain torch: one static KV cache, every decoding step one replayed CUDA graph, and the example
story that opens the prompt stored once for the whole batch. On a CPU it runs eagerly, for tests.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from story_prompts import EXAMPLES, compose, render_examples, render_prompt
from tokenizers import Tokenizer

END_OF_TURN, NEWLINE = 2, 198  # SmolLM2's ids of <|im_end|> and of a line break; a new paragraph is two of them
CLOSE_AFTER = 90
BUCKET = 32  # cache lengths are rounded up to this: one CUDA graph for each bucket


class Generator:
    """SmolLM2 with a static KV cache for a fixed batch size.

    Keys and values lie in ``own`` [layers, 2, B, KV, T, D] and, for the prompt part that all sequences share, in
    ``shared`` [layers, 2, 1, KV, S, D]. All sequences stand at the same position: prompts of unequal length are
    fed token by token from the end of the shortest one on.
    """

    def __init__(self, folder: Path, batch: int, max_own: int, max_shared: int, device: str, dtype: torch.dtype):
        c = json.loads((folder / "config.json").read_text())
        self.n_layers, self.n_heads, self.n_kv = (
            c["num_hidden_layers"],
            c["num_attention_heads"],
            c["num_key_value_heads"],
        )
        self.dim = c["hidden_size"] // self.n_heads
        self.eps = c["rms_norm_eps"]
        self.batch, self.device = batch, device
        tensors = load_file(folder / "model.safetensors")
        self.w = {k.removeprefix("model."): v.to(device, dtype) for k, v in tensors.items()}
        for i in range(self.n_layers):  # one product instead of three, and of two
            p = f"layers.{i}."
            self.w[p + "qkv"] = torch.cat([self.w.pop(f"{p}self_attn.{x}_proj.weight") for x in "qkv"])
            self.w[p + "gate_up"] = torch.cat([self.w.pop(f"{p}mlp.{x}_proj.weight") for x in ("gate", "up")])
        self.own = torch.zeros(self.n_layers, 2, batch, self.n_kv, max_own, self.dim, device=device, dtype=dtype)
        self.shared = torch.zeros(self.n_layers, 2, 1, self.n_kv, max_shared, self.dim, device=device, dtype=dtype)
        self.n_shared = torch.zeros((), dtype=torch.long, device=device)
        self.shared_len = 0
        freqs = c["rope_theta"] ** (-torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        angles = torch.outer(torch.arange(max_own + max_shared, dtype=torch.float32), freqs).repeat(1, 2)  # (T, D)
        self.cos, self.sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    def _rope(self, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[pos][:, None], self.sin[pos][:, None]  # (Q, 1, D)
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def _attend(self, q: torch.Tensor, layer: int, pos: torch.Tensor, length: int) -> torch.Tensor:
        """q [B, Q, H, D] against the shared and the own cache up to ``length`` -> [B, Q, H*D]."""
        b, n, g = q.shape[0], q.shape[1], self.n_heads // self.n_kv
        q = q.view(b, n, self.n_kv, g, self.dim).permute(2, 0, 3, 1, 4) * self.dim**-0.5  # (KV, B, G, Q, D)
        parts, values = [], []
        if self.shared_len:
            ks, vs = self.shared[layer, :, 0]  # (KV, S, D) each
            s = q.reshape(self.n_kv, b * g * n, self.dim) @ ks.transpose(1, 2)  # one product for all
            hidden = torch.arange(ks.shape[1], device=s.device) >= self.n_shared
            parts.append(
                s.masked_fill(hidden, float("-inf")).view(self.n_kv, b, g * n, -1).transpose(0, 1)
            )  # (B, KV, G*Q, S)
            values.append(vs)
        k, v = self.own[layer, :, :b, :, :length]  # (B, KV, T, D) each
        s = q.transpose(0, 1).reshape(b, self.n_kv, g * n, self.dim) @ k.transpose(2, 3)  # (B, KV, G*Q, T)
        future = torch.arange(length, device=s.device)[None, :] > pos[:, None]  # (Q, T)
        parts.append(s.view(b, self.n_kv, g, n, length).masked_fill(future, float("-inf")).view_as(s))
        p = torch.cat(parts, dim=-1).float().softmax(dim=-1).to(q.dtype)
        out = p[..., -length:] @ v  # (B, KV, G*Q, D)
        if values:
            ps = p[..., :-length].transpose(0, 1).reshape(self.n_kv, b * g * n, -1)
            out = out + (ps @ values[0]).view(self.n_kv, b, g * n, self.dim).transpose(0, 1)
        return out.view(b, self.n_kv, g, n, self.dim).permute(0, 3, 1, 2, 4).reshape(b, n, -1)

    def forward(self, tokens: torch.Tensor, pos: torch.Tensor, length: int) -> torch.Tensor:
        """tokens [B, Q] at own positions pos [Q] (< length) -> logits of the last one, float32 [B, vocab]."""
        b, n = tokens.shape
        h, w = F.embedding(tokens, self.w["embed_tokens.weight"]), self.w
        rope_pos = pos + self.n_shared if self.shared_len else pos
        sizes = [self.n_heads * self.dim, self.n_kv * self.dim, self.n_kv * self.dim]
        for i in range(self.n_layers):
            p = f"layers.{i}."
            x = F.rms_norm(h, (h.shape[-1],), w[p + "input_layernorm.weight"], self.eps)
            q, k, v = (y.view(b, n, -1, self.dim) for y in (x @ w[p + "qkv"].T).split(sizes, dim=-1))
            self.own[i, 0, :b].index_copy_(2, pos, self._rope(k, rope_pos).transpose(1, 2))
            self.own[i, 1, :b].index_copy_(2, pos, v.transpose(1, 2))
            h = h + self._attend(self._rope(q, rope_pos), i, pos, length) @ w[p + "self_attn.o_proj.weight"].T
            x = F.rms_norm(h, (h.shape[-1],), w[p + "post_attention_layernorm.weight"], self.eps)
            gate, up = (x @ w[p + "gate_up"].T).chunk(2, dim=-1)
            h = h + (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
        h = F.rms_norm(h[:, -1], (h.shape[-1],), w["norm.weight"], self.eps)
        return (h @ w["embed_tokens.weight"].T).float()

    def set_shared(self, ids: list[int]) -> None:
        """Computes the cache of the part that every sequence begins with."""
        self.shared_len = 0
        n = len(ids)
        self.forward(torch.tensor([ids], device=self.device), torch.arange(n, device=self.device), n)
        self.shared[:, :, 0, :, :n] = self.own[:, :, 0, :, :n]
        self.n_shared.fill_(n)
        self.shared_len = n


def sample(logits: torch.Tensor, temperature: float, min_p: float) -> torch.Tensor:
    """One token a row among those at least ``min_p`` times as likely as the likeliest; logits [B, V] -> [B].

    argmax(p / Exponential(1)) draws from p without a sort or a sum.
    """
    p = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    p = torch.where(p < min_p, 0.0, p)
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)


class Decoder:
    """The decoding step over fixed buffers: one CUDA graph for each bucket of the cache, or eager on a CPU."""

    def __init__(self, gen: Generator, max_own: int, max_closing: int, a: argparse.Namespace):
        dev = gen.device
        self.gen, self.temperature, self.min_p = gen, a.temperature, a.min_p
        self.ngram, self.penalty = a.ngram, a.penalty
        self.ids = torch.zeros(gen.batch, max_own, dtype=torch.long, device=dev)
        self.prompt_len = torch.zeros(gen.batch, dtype=torch.long, device=dev)
        self.pos = torch.zeros(1, dtype=torch.long, device=dev)
        self.closing = torch.zeros(gen.batch, max_closing, dtype=torch.long, device=dev)
        self.closing_len = torch.zeros(gen.batch, dtype=torch.long, device=dev)
        self.closed = torch.zeros(gen.batch, dtype=torch.long, device=dev)  # tokens of the closing already written
        self.graphs: dict[int, Callable[[], None]] = {}
        self.pool = torch.cuda.graph_pool_handle() if dev != "cpu" else None

    def _discourage(self, logits: torch.Tensor, pos: torch.Tensor, length: int) -> torch.Tensor:
        """Forbids repeating ``ngram`` tokens of the story in a row, and makes every token already used less likely."""
        n, ids = self.ngram, self.ids[:, :length]
        at = torch.arange(length, device=ids.device)
        used = torch.where((at <= pos) & (ids != END_OF_TURN), ids, 0)  # 0 is <|endoftext|>: never wanted
        logits.scatter_(1, used, logits.gather(1, used) - self.penalty)
        last = self.ids.index_select(1, pos + torch.arange(2 - n, 1, device=ids.device))  # (B, n-1)
        same = (ids.unfold(1, n - 1, 1)[:, :-1] == last[:, None]).all(dim=-1) & (at[n - 1 :] <= pos)  # (B, length-n+1)
        return logits.scatter_(1, torch.where(same, ids[:, n - 1 :], 0), float("-inf"))

    def _close(self, new: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """After CLOSE_AFTER tokens of its own, the story's next paragraph begins with the closing and is the last."""
        after_break = (self.ids.index_select(1, torch.cat([pos - 1, pos])) == NEWLINE).all(dim=1)
        start = (self.closed == 0) & after_break & (pos - self.prompt_len >= CLOSE_AFTER)
        going = start | ((self.closed > 0) & (self.closed < self.closing_len))
        forced = self.closing.gather(1, self.closed.clamp(max=self.closing.shape[1] - 1)[:, None])[:, 0]
        done = (self.closed == self.closing_len) & (new == NEWLINE)
        self.closed += going.long()
        return torch.where(going, forced, torch.where(done, END_OF_TURN, new))

    def store(self, logits: torch.Tensor, pos: torch.Tensor, length: int) -> None:
        """Writes the token after ``pos``: the prompt's own while it lasts, a sampled one afterwards."""
        new = self._close(sample(self._discourage(logits, pos, length), self.temperature, self.min_p), pos)
        given = self.ids.index_select(1, pos + 1)[:, 0]
        self.ids.index_copy_(1, pos + 1, torch.where(pos + 1 < self.prompt_len, given, new)[:, None])

    def _step(self, length: int) -> None:
        self.store(self.gen.forward(self.ids.index_select(1, self.pos), self.pos, length), self.pos, length)

    def step(self, pos: int) -> None:
        self.pos.fill_(pos)
        length = (pos // BUCKET + 1) * BUCKET
        if self.gen.device == "cpu":
            return self._step(length)
        if length not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a graph must be captured warm
                state = self.closed.clone()
                self._step(length)
                self.closed.copy_(state)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._step(length)
            self.graphs[length] = graph.replay
        self.graphs[length]()

    def run(self, prompts: list[list[int]], closings: list[list[int]], max_new: int) -> list[list[int]]:
        """Token ids of each prompt and its continuation, without the end-of-turn token; [] if it did not end."""
        lens = torch.tensor([len(p) for p in prompts])
        self.ids.fill_(END_OF_TURN)
        rows = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(p) for p in prompts], batch_first=True, padding_value=END_OF_TURN
        )
        self.ids[:, : rows.shape[1]] = rows.to(self.ids.device)
        self.prompt_len.copy_(lens)
        self.closing_len.copy_(torch.tensor([len(c) for c in closings]))
        self.closing.copy_(torch.tensor([(c + [0] * self.closing.shape[1])[: self.closing.shape[1]] for c in closings]))
        self.closed.zero_()
        first, last = int(lens.min()), min(int(lens.max()) + max_new, self.ids.shape[1])
        pos = torch.arange(first, device=self.ids.device)
        self.store(self.gen.forward(self.ids[:, :first], pos, first), pos[-1:], first)
        for t in range(first, last - 1):
            self.step(t)
            if t % 32 == 0 and t > first + 64 and self._ended(t).float().mean() > 0.97:
                break
        out = []
        for row, n in zip(self.ids[:, : t + 2].tolist(), lens.tolist(), strict=True):
            out.append(row[: row.index(END_OF_TURN, n)] if END_OF_TURN in row[n:] else [])
        return out

    def _ended(self, t: int) -> torch.Tensor:
        """[B] bool: the sequence has an end-of-turn token after its prompt."""
        at = torch.arange(t + 2, device=self.ids.device)
        return ((self.ids[:, : t + 2] == END_OF_TURN) & (at >= self.prompt_len[:, None])).any(dim=1)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--seconds", type=float, default=330, help="start no batch after this time")
    ap.add_argument("--batch", type=int, default=3072)
    ap.add_argument("--max-new", type=int, default=224)
    ap.add_argument("--temperature", type=float, default=0.7)
    ap.add_argument("--min-p", type=float, default=0.1)
    ap.add_argument("--ngram", type=int, default=4, help="so many tokens in a row do not occur twice in a story")
    ap.add_argument("--penalty", type=float, default=1.0, help="subtracted from the logits of tokens already used")
    ap.add_argument("--examples", type=int, default=1, help="example stories before each prompt")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.parse_args()
    torch.manual_seed(a.seed)
    torch.set_grad_enabled(False)
    rng = random.Random(a.seed)
    tok = Tokenizer.from_file(str(a.model / "tokenizer.json"))
    start = tok.token_to_id("<|im_start|>")
    shared = [tok.encode(render_examples(i, a.examples)).ids for i in range(len(EXAMPLES) * (len(EXAMPLES) - 1))]
    max_own = 704  # room for the shared part while it is computed, and for a prompt with its story
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    gen = Generator(a.model, a.batch, max_own, max(map(len, shared)), a.device, dtype)
    decoder = Decoder(gen, max_own, 12, a)
    # Sorted by length, so that few prompts of a batch are fed token by token; the batches are taken in random order.
    drawn = [compose(rng) for _ in range(a.batch * (80 if a.device == "cuda" else 1))]
    encoded = zip(
        *(tok.encode_batch(t) for t in ([render_prompt(p) for p in drawn], [p.closing for p in drawn])), strict=True
    )
    pool = sorted(((p.ids, c.ids) for p, c in encoded), key=lambda x: len(x[0]))
    batches = [pool[i : i + a.batch] for i in range(0, len(pool), a.batch)]
    rng.shuffle(batches)
    began, written, chars = time.monotonic(), 0, 0
    with gzip.open(a.out, "wt", compresslevel=6, encoding="utf-8") as f:
        for i, prompts in enumerate(batches):
            if time.monotonic() - began > a.seconds:
                break
            gen.set_shared(shared[rng.randrange(len(shared))])
            done = [ids for ids in decoder.run(*zip(*prompts, strict=True), a.max_new) if ids]
            texts = tok.decode_batch([ids[len(ids) - ids[::-1].index(start) :] for ids in done])
            stories = [" ".join(t.removeprefix("assistant").split()) for t in texts]
            f.write("".join(s + "\n\n" for s in stories))
            written, chars = written + len(stories), chars + sum(map(len, stories))
            took = time.monotonic() - began
            print(
                f"batch {i}: {len(stories)}/{a.batch} ended, {written} stories, {chars / 1e6:.1f} MB, {took:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
