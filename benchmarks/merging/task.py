"""An encoder–decoder variant's task: greedy answers against targets (ROUGE), and what it says of every target token."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.baselines.evaluation import Advance, Evaluation, Marks, Model
from benchmarks.merging.rouge import rouge
from polymoe.engine.llm import LLM
from polymoe.engine.request import SamplingParams
from polymoe.engine.tokenizer import VariantTokenizer
from polymoe.errors import PolymoeError
from polymoe.evaluate.fidelity import Logits, Samples, padded
from polymoe.model.skeleton import context_limit
from polymoe.offline.family import Family
from polymoe.offline.pairs import Pair, pair_ids, read_pairs

MIN_PAIRS = 20  # fewer say nothing

Ids = list[int]


class TaskEvaluation(Evaluation):
    """Pairs of the variant's own task; greedy answers of `max_new_tokens` at most."""

    kind = "pairs"

    def __init__(
        self, family: Family, variant: str, pairs: Sequence[Pair], max_new_tokens: int, folder: Path, batch: int = 32
    ) -> None:
        checkpoint = family.checkpoints[family.names.index(variant)]
        config, self.max_new_tokens = checkpoint.config, max_new_tokens
        self.tokenizer = VariantTokenizer(checkpoint.path)
        self.ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        encoded = pair_ids(pairs, self.tokenizer.encode, checkpoint.path, config)
        # Pairs of similar length share a pass, or most of it would be padding.
        order = sorted(range(len(pairs)), key=lambda i: (len(encoded[i][0]), len(encoded[i][1])))
        self.references = [pairs[i].target for i in order]
        samples = Samples([encoded[i][1] for i in order], [encoded[i][0] for i in order])
        longest = _check_lengths(variant, samples, max_new_tokens, context_limit(config) // 2)
        super().__init__(family, variant, samples, 2 * longest, batch, folder)

    def _marks(self, logits: Logits, model: Callable[[], Model], advance: Advance) -> Marks:
        answers: list[str] = []
        answering = model()

        def both(first: int, windows: list[Ids]) -> list[torch.Tensor]:
            assert self.samples.inputs is not None
            inputs = self.samples.inputs[first : first + len(windows)]
            answers.extend(map(self._text, greedy_answers(answering, self.variant, inputs, self.max_new_tokens)))
            return logits(first, windows)

        fidelity = super()._marks(both, model, advance).fidelity
        return Marks(fidelity, rouge(answers, self.references))

    def _text(self, ids: Ids) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return self.tokenizer.decode(ids[:end])


def greedy_answers(model: Model, variant: str, inputs: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
    """What the variant answers to each; an end-of-text token and what follows it may be there or not."""
    if isinstance(model, LLM):
        greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)
        return [found.outputs[0].token_ids for found in model.generate(list(inputs), greedy, variant)]
    with torch.inference_mode():
        written = model.model.generate(**padded(inputs), max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    return [row[1:] for row in written.tolist()]  # without the decoder's start token


def draw_pairs(name: str, path: Path, limit: int, seed: int) -> list[Pair]:
    """At most `limit` pairs of a file of `{"input": …, "target": …}` a line, drawn without replacement, in the file's
    order. Blank lines are left out.

    Args:
        name: the variant, for messages.

    Raises `PolymoeError` naming file and line for one that is no pair, and for fewer than `MIN_PAIRS` of them.
    """
    pairs = read_pairs(f"--task {name}", path)
    if len(pairs) < MIN_PAIRS:
        raise PolymoeError(
            f"--task {name}: {path} has {len(pairs)} pairs; at least {MIN_PAIRS} are needed, and 200 are good."
        )
    chosen = sorted(random.Random(seed).sample(range(len(pairs)), min(limit, len(pairs))))
    return [pairs[i] for i in chosen]


def _check_lengths(variant: str, samples: Samples, max_new_tokens: int, limit: int) -> int:
    """The longest of an encoder's and a decoder's tokens. Raises `PolymoeError` for what is beyond their positions."""
    lengths = {
        "an input": max(len(ids) for ids in samples.inputs or ()),
        "a target": max(len(window) for window in samples.windows),
        "an answer of --max-new-tokens": max_new_tokens + 1,
    }
    for what, longest in lengths.items():
        if longest > limit:
            raise PolymoeError(
                f"--task {variant}: {what} may be {longest} tokens long, and the variant was configured for {limit}; "
                "leave out what is longer."
            )
    return max(lengths.values())
