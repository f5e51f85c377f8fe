"""Step 2: keep the good stories and split them.

    python prepare_text.py stories.txt.gz TEXT_DIR --assets ASSETS_DIR

Writes TEXT_DIR/train.txt and TEXT_DIR/valid.txt, and calibration.txt and heldout.txt into ASSETS_DIR; no story is in
two of the four. One story is one line; in the assets a blank line stands between stories.
"""

# ruff: noqa: SIM905  (word lists read better as text)

from __future__ import annotations

import argparse
import gzip
import random
import re
from collections import Counter
from pathlib import Path

QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "`": "'", "\u00b4": "'", "\u2013": "-"})
ALLOWED = re.compile(r"""[A-Za-z0-9 .,!?;:'"-]+""")
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
SENTENCE_END = re.compile(r"""[.!?]["']?(?= |$)""")
# Not for a children's story, or talk about the task itself.
UNWANTED = frozenset(
    """
kill killed killing kills die died dies dying dead death blood bloody gun guns knife wine beer drunk alcohol sex
sexy naked hell damn god gods stupid hate hated ugly evil slave murder murdered poison rape drug drugs cigarette
cigarettes smoke smoking weapon weapons war suicide prison jail fat idiot dumb meat butt ass breast breasts lap
pregnant corpse funeral cancer disease user assistant ai paragraph www http com example examples prompt sexual
dollars bank wife husband girlfriend boyfriend abuse abused sacrifice guests accommodate business
""".split()
)


def clean(story: str) -> str | None:
    """The story in plain ASCII, cut after its last whole sentence; None if what is left is not worth learning from."""
    story = " ".join(story.translate(QUOTES).split())
    ends = [m.end() for m in SENTENCE_END.finditer(story)]
    if not ends or len(story) - ends[-1] > 120:
        return None
    story = story[: ends[-1]]
    if story.count('"') % 2:  # speech cut short: go back to the last sentence that ends outside of it
        ends = [e for e in ends if story[:e].count('"') % 2 == 0]
        if not ends or len(story) - ends[-1] > 150:
            return None
        story = story[: ends[-1]]
    if not 350 <= len(story) <= 1000 or not ALLOWED.fullmatch(story) or " '" in story.replace(" 'em", ""):
        return None
    return story if _varied(story) and _faithful(story) else None


def _varied(story: str) -> bool:
    """Few repeated words, sentences and beginnings of sentences."""
    words = [w.lower() for w in WORD.findall(story)]
    if len(set(words)) < 0.40 * len(words) or not UNWANTED.isdisjoint(words):
        return False
    if any(w.isupper() and len(w) > 2 for w in WORD.findall(story)):
        return False
    sentences = [s.strip(' "') for s in re.split(r"(?<=[.!?])[\"']? ", story)]
    starts = Counter(" ".join(s.split()[:2]) for s in sentences)
    return len(set(sentences)) == len(sentences) and max(starts.values()) <= max(3, 0.3 * len(sentences))


def _faithful(story: str) -> bool:
    """The hero named in the opening stays in the story, and stays a he or a she."""
    opening, rest = story[: len(story) // 3], story[len(story) // 3 :]
    named = re.search(r"(?:named|called) ([A-Z][a-z]+)", opening)
    named = named or re.search(r"([A-Z][a-z]+) (?:was|had|lived|and|went)", opening)
    names = re.findall(r"(?<![.!?] )(?<![\"'])\b([A-Z][a-z]+)\b", opening)
    hero = named.group(1) if named else ""
    if hero in ("", "It", "He", "She", "They", "There"):
        hero = names[0] if names else ""
    if not hero or len(re.findall(hero, rest)) < 1 or story.count(hero) < 2:
        return False
    pronoun = re.search(r"\b(he|she|his|her)\b", opening.lower())
    if not pronoun:
        return True
    he, she = (len(re.findall(p, story.lower())) for p in (r"\b(?:he|his|him)\b", r"\b(?:she|her|hers)\b"))
    mine, other = (he, she) if pronoun.group(1) in ("he", "his") else (she, he)
    return mine >= 0.8 * other


def without_rare_words(stories: list[str], least: int) -> list[str]:
    """Drops the stories with a word that fewer than ``least`` stories have: mostly misspelt or invented ones."""
    sets = [set(WORD.findall(s)) for s in stories]
    count = Counter(w for words in sets for w in words)
    return [s for s, words in zip(stories, sets, strict=True) if min(count[w] for w in words) >= least]


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("stories", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--assets", type=Path, required=True)
    ap.add_argument("--least", type=int, default=6, help="stories that a word must occur in")
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    opener = gzip.open if a.stories.suffix == ".gz" else open
    with opener(a.stories, "rt", encoding="utf-8") as f:
        raw = [s for s in f.read().split("\n\n") if s]
    stories = sorted({c for s in raw if (c := clean(s))})
    good = without_rare_words(stories, a.least)
    random.Random(a.seed).shuffle(good)
    parts, rest = {}, good
    for name, chars in (("heldout", 64_000), ("calibration", 120_000), ("valid", 500_000)):
        n, total = 0, 0
        while total < chars and n < len(rest) // 2:
            total, n = total + len(rest[n]) + 2, n + 1
        parts[name], rest = rest[:n], rest[n:]
    a.out.mkdir(parents=True, exist_ok=True)
    a.assets.mkdir(parents=True, exist_ok=True)
    for name in ("heldout", "calibration"):
        (a.assets / f"{name}.txt").write_text("\n\n".join(parts[name]) + "\n", encoding="utf-8")
    (a.out / "valid.txt").write_text("\n".join(parts["valid"]) + "\n", encoding="utf-8")
    (a.out / "train.txt").write_text("\n".join(rest) + "\n", encoding="utf-8")
    sizes = {k: len(v) for k, v in parts.items()} | {"train": len(rest)}
    print(f"{len(raw)} stories, {len(stories)} clean, {len(good)} without rare words")
    print(f"{sizes}; train {sum(map(len, rest)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
