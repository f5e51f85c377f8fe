"""How long windows of text are, and what is said of those that are too long."""

from __future__ import annotations

import logging

from tinygptq.config import LlamaConfig

log = logging.getLogger("tinygptq")

WINDOW = 2048  # tokens, as in the papers


def usual_window(config: LlamaConfig) -> int:
    """WINDOW, or as many tokens as the model was made for, if those are fewer."""
    return min(WINDOW, config.max_position_embeddings)


def warn_of_long_windows(config: LlamaConfig, tokens: int) -> None:
    """Log a warning where windows have more tokens than the model was made for."""
    if tokens > (most := config.max_position_embeddings):
        log.warning("windows of %d tokens, but the model was made for %d: beyond them it knows nothing; see --seqlen",
                    tokens, most)  # fmt: skip
