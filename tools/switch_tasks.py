"""Sequence-to-sequence tasks made of the corpus's four texts: pairs of an input and a target.

| task | input | target |
|---|---|---|
| fill | a passage with spans left out | the spans |
| math | a question and its bare calculations | the worked answer |
| code | the body of a function | its signature |
| drama | speaker, the line before, key words of the line | the speaker's next line |

Every input begins with the task's name, so that one base model can learn them all.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

TEXTS = ("wiki", "math", "drama", "code")
MARKERS = [f"<{i}>" for i in range(1, 4)]  # one for each span that `fill` leaves out

Pair = tuple[str, str]


def read(corpus: Path, text: str, split: str) -> str:
    return (corpus / f"{text}.{split}.txt").read_text(encoding="utf-8")


def math_pairs(text: str) -> list[Pair]:
    """The calculations that the worked answer is annotated with stand in the input, without a word of explanation."""
    pairs = []
    for example in text.split("\n\n"):
        question, _, answer = example.partition("\nAnswer: ")
        worked, _, _ = answer.partition("\n####")
        calculations = re.findall(r"<<(.+?)>>", worked)
        if calculations:
            asked = " ".join(question.removeprefix("Question: ").split())
            pairs.append((f"math: {'; '.join(calculations)} | {asked}", re.sub(r"<<.+?>>", "", worked).strip()))
    return pairs


def code_pairs(text: str) -> list[Pair]:
    """Functions of two lines and more whose signature is one line."""
    lines, pairs = text.split("\n"), []
    for number, line in enumerate(lines):
        found = re.match(r"( *)((?:async )?def \w+\(.*\).*:)$", line)
        if not found:
            continue
        indent, body = len(found[1]), []
        for following in lines[number + 1 : number + 25]:
            if following.strip() and len(following) - len(following.lstrip()) <= indent:
                break
            if following.strip():
                body.append(following)
        if len(body) >= 2:
            margin = len(body[0]) - len(body[0].lstrip())
            pairs.append(("code: " + "\n".join(row[margin:] for row in body), found[2]))
    return pairs


def drama_pairs(text: str) -> list[Pair]:
    """One pair for each line with at least two key words (words of five letters and more, in alphabetical order)."""
    pairs, before = [], "."
    for speech in text.split("\n\n"):
        speaker, _, spoken = speech.partition("\n")
        for line in spoken.split("\n"):
            words = sorted({word.lower() for word in re.findall(r"[A-Za-z']+", line) if len(word) >= 5})
            if len(words) >= 2:
                pairs.append((f"drama: {' '.join(words)} | {speaker} {before}", line))
            before = line
    return pairs


def fill_pairs(text: str) -> list[Pair]:
    """Passages of thirty words; three spans of one to three words are left out."""
    pieces = re.findall(r"\s*\S+", text)
    dice, pairs = np.random.default_rng(0), []
    for start in range(0, len(pieces) - 30, 15):
        passage, spans, place = pieces[start : start + 30], [], 0
        shown: list[str] = []
        for marker in MARKERS:
            kept, gone = int(dice.integers(2, 8)), int(dice.integers(1, 4))
            shown += [*passage[place : place + kept], f" {marker}"]
            spans.append(f"{marker}{''.join(passage[place + kept : place + kept + gone])}")
            place += kept + gone
        pairs.append((f"fill: {''.join(shown + passage[place:]).strip()}", " ".join(spans)))
    return pairs


_MAKERS: dict[str, Callable[[str], list[Pair]]] = {"math": math_pairs, "code": code_pairs, "drama": drama_pairs}
TASKS = ("fill", *_MAKERS)


def make_pairs(corpus: Path, task: str, split: str) -> list[Pair]:
    """All pairs of a task in the split, each input once, in a shuffled order that is always the same."""
    if task == "fill":
        found = [pair for text in TEXTS for pair in fill_pairs(read(corpus, text, split))]
    else:
        found = _MAKERS[task](read(corpus, task, split))
    pairs = list(dict(found).items())
    return [pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))]


def write_jsonl(pairs: list[Pair], path: Path) -> None:
    """One `{"input": …, "target": …}` a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"input": source, "target": target}, ensure_ascii=False) + "\n" for source, target in pairs)
    path.write_text("".join(lines), encoding="utf-8")
