"""lm-evaluation-harness: `local-completions` against this server gives what its `hf` backend gives, request by request.

Log-likelihoods of continuations and of whole texts within 1e-4 of each other, and the same greedy answers.
"""

from typing import Any

from given import CHECKPOINTS, URL
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

MOST = 1e-4
LENGTH = 256  # tokens
PAIRS = [
    ("The king said to his servants:", " bring me the horses"),
    ("def add(a, b):\n    return", " a + b"),
    ("Theorem 1. Let x be a real number. Then", " x is greater than"),
    ("Once upon a time", " there was a small house in the forest, and nobody knew who had built it."),
    ("", "A text without a context."),
    ("Enter ROMEO and JULIET.\n\nROMEO.", " What light through yonder window breaks?"),
    ("for i in range(10):\n", "    print(i)\n"),
    ("The sum of two even numbers is", " even."),
]
# The last one is longer than a window, but not much: the harness adds up a window in float32, which rounds at 1e-4
# where a log-likelihood is beyond a thousand.
TEXTS = [context + continuation for context, continuation in PAIRS] + [" ".join(c for _, c in PAIRS) * 5]
UNTIL: Any = {"until": ["\n\n", "."], "max_gen_toks": 48, "do_sample": False, "temperature": 0.0}


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=k) for k, given in enumerate(arguments)]


def compare(name: str, hf: Any, served: Any) -> dict[str, Any]:
    pairs = instances("loglikelihood", list(PAIRS))
    worst = 0.0
    for (found, found_greedy), (wanted, greedy) in zip(
        served.loglikelihood(pairs), hf.loglikelihood(pairs), strict=True
    ):
        worst = max(worst, abs(found - wanted))
        assert found_greedy == greedy, name
    assert worst < MOST, (name, "loglikelihood", worst)
    texts = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    for found, wanted in zip(served.loglikelihood_rolling(texts), hf.loglikelihood_rolling(texts), strict=True):
        worst = max(worst, abs(found - wanted))
    assert worst < MOST, (name, "loglikelihood_rolling", worst)
    asked = instances("generate_until", [(context, dict(UNTIL)) for context, _ in PAIRS if context])
    answers, wanted_answers = served.generate_until(asked), hf.generate_until(asked)
    assert answers == wanted_answers, (name, list(zip(answers, wanted_answers, strict=True)))
    return {"variant": name, "requests": len(pairs) + len(texts) + len(asked), "worst": worst}


def main() -> None:
    for name, path in CHECKPOINTS.items():
        # The other takes two tokens off its length, one for the context and one for what is generated.
        hf = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=1, max_length=LENGTH)
        served = LocalCompletionsAPI(
            base_url=f"{URL}/v1/completions", model=name, tokenizer=str(path), tokenizer_backend="huggingface",
            max_length=LENGTH + 2, num_concurrent=4, max_retries=1,
        )  # fmt: skip
        print(compare(name, hf, served), flush=True)


if __name__ == "__main__":
    main()
