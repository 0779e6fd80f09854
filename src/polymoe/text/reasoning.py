"""What a model thinks before it answers, told apart from the answer."""

from dataclasses import dataclass

from polymoe.text.tools.lark import Token

# Begin and end: Qwen, DeepSeek, GLM and others; Magistral; Seed-OSS.
_PAIRS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


@dataclass(frozen=True)
class ReasoningMarks:
    begin: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether the prompt ends within the reasoning: some templates begin it for the model."""
        return prompt.rfind(self.begin) > prompt.rfind(self.end)

    def rest_of_thought(self, token: Token) -> tuple[str, str]:
        """A grammar of what is left of the reasoning when it has begun, for `answer_after`."""
        return r"thought /\s{0,8}/", token.text_before(self.end, "thought")


def reasoning_marks(template: str) -> ReasoningMarks | None:
    """Those that a chat template writes, or takes out of earlier turns."""
    return next((ReasoningMarks(*pair) for pair in _PAIRS if pair[1] in template), None)


class ReasoningSplitter:
    """Text in pieces -> (reasoning, answer) in pieces. White space around the marks belongs to neither.

    Args: is_open: the text begins within the reasoning; otherwise there is some if the text begins with the mark.
    """

    def __init__(self, marks: ReasoningMarks, is_open: bool) -> None:
        self._marks = marks
        self._held = ""
        self._state = "thinking" if is_open else "before"
        self._fresh = True  # nothing but white space so far in this state

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """`last`: no more text will come, so that nothing is held back."""
        self._held += text
        thoughts = ""
        if self._state == "before":
            begun = self._held.lstrip()
            if begun.startswith(self._marks.begin):
                self._state, self._held = "thinking", begun[len(self._marks.begin) :]
            elif last or not self._marks.begin.startswith(begun):
                self._state, self._fresh = "answering", False
        if self._state == "thinking":
            thought, mark, rest = self._held.partition(self._marks.end)
            if not mark and not last:
                keep = _held_back(thought, self._marks.end)
                thought, rest = thought[: len(thought) - keep], thought[len(thought) - keep :]
            thoughts = self._without_lead(thought)
            self._held = rest
            if mark:
                self._state, self._fresh, thoughts = "answering", True, thoughts.rstrip("\n")
        if self._state != "answering":
            return thoughts, ""
        answer, self._held = self._without_lead(self._held), ""
        return thoughts, answer

    def _without_lead(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


def _held_back(text: str, mark: str) -> int:
    """Characters at the end that may be line ends before the mark, and its beginning."""
    part = next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
    before = text[: len(text) - part]
    return part + len(before) - len(before.rstrip("\n"))
