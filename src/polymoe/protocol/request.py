"""What a client asks of the engine and what it gets back; field names follow vLLM's classes of the same names.

These types cross the process border (msgspec over a private socket), so they are plain msgspec structs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from polymoe.errors import RequestError
from polymoe.field_types import wrong_field
from polymoe.protocol.structured_outputs import StructuredOutputsParams

MAX_N = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_BAD_WORDS = 256
MAX_PRIORITY = 1000
DEFAULT_SLO_CLASS = "default"
# Temperatures below this are greedy, as in vLLM: logits divided by them would leave the range of float32.
MIN_TEMPERATURE = 1e-5


class TokenSampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine chooses the tokens of one sequence: the checked values of a `SamplingParams`, which alone knows
    their ranges."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # -1 is None: every request draws anew
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None  # how many alternatives to report beside the sampled token
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None  # no other token can be drawn

    @property
    def greedy(self) -> bool:
        """The most probable token is the only one that can be drawn."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    @property
    def penalises(self) -> bool:
        """Whether a penalty depends on the tokens that the sequence has."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class SamplingParams(TokenSampling, frozen=True, kw_only=True):
    """How the tokens of one request are chosen. Defaults and meanings are vLLM's; `temperature=0` is greedy, and so
    is one below `MIN_TEMPERATURE`.

    Raises `RequestError` (with `param` set) for a value out of range.
    """

    n: int = 1
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    bad_words: list[str] = []  # texts that are not written, neither at a word's beginning nor within one
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if self.seed == -1:
            msgspec.structs.force_setattr(self, "seed", None)

        def check(ok: bool, param: str, rule: str) -> None:
            if not ok:
                given = repr(getattr(self, param))
                shown = given if len(given) <= 200 else given[:200] + "…"
                raise RequestError(f"{param} must be {rule}, got {shown}.", param=param)

        if (wrong := wrong_field(self)) is not None:
            raise RequestError(f"{wrong[0]} must be {wrong[1]}.", param=wrong[0])
        check(1 <= self.n <= MAX_N, "n", f"between 1 and {MAX_N}")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        check(self.top_k >= -1, "top_k", "-1 or 0 (all tokens) or a positive count")
        check(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "in (0, 100]")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        check(len(self.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings")
        check(
            all(0 < len(s) <= MAX_STOP_CHARS for s in self.stop), "stop", f"strings of 1 to {MAX_STOP_CHARS} characters"
        )
        check(len(self.stop_token_ids) <= 128, "stop_token_ids", "at most 128 token ids")
        check(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", "token ids, zero or more")
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            check(count is None or 0 <= count <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}")
        ids = self.allowed_token_ids
        check(ids is None or (len(ids) > 0 and min(ids) >= 0), "allowed_token_ids", "token ids, at least one")
        check(len(self.bad_words) <= MAX_BAD_WORDS, "bad_words", f"at most {MAX_BAD_WORDS} texts")
        fine = all(0 < len(word) <= MAX_STOP_CHARS for word in self.bad_words)
        check(fine, "bad_words", f"texts of 1 to {MAX_STOP_CHARS} characters")
        if self.structured_outputs is not None:
            # Each leaves tokens out by itself; together they might leave none.
            check(ids is None, "allowed_token_ids", "left out with structured_outputs")
            check(not self.bad_words, "bad_words", "left out with structured_outputs")
            check(not self.ignore_eos, "ignore_eos", "false with structured_outputs, whose answers end")
        check(len(self.logit_bias) <= 1024, "logit_bias", "at most 1024 tokens")
        check(all(t >= 0 for t in self.logit_bias), "logit_bias", "a map from token ids, zero or more")
        check(all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()), "logit_bias", "biases in [-100, 100]")


def sampling_params(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """What a request gives, completed by its variant's defaults. Raises `RequestError`."""
    values = {**defaults, **given}
    if "min_tokens" not in given:  # a default does not make a short request wrong
        most = values.get("max_tokens", SamplingParams().max_tokens)
        values["min_tokens"] = min(values.get("min_tokens", 0), max(most, 0))
    return SamplingParams(**values)


class QoS(msgspec.Struct, frozen=True, kw_only=True):
    """How urgent a request is, and for whom.

    Raises `RequestError` for a priority out of range; whether the class exists is the engine's to say.
    """

    tenant: str = ""  # tenants of a variant share its tokens, by their weights
    weight: float = 1.0  # of the tenant, more than 0; the server's to say, not the client's
    priority: int = 0  # lower comes earlier, among the requests of one tenant for one variant
    slo_class: str = DEFAULT_SLO_CLASS

    def __post_init__(self) -> None:
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise RequestError(
                f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {self.priority}.", param="priority"
            )


class SequenceId(NamedTuple):
    """Names one sequence across the process border: of a client's request, its prompt, and the n choices for that."""

    request: str
    prompt: int = 0
    choice: int = 0


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to extend, checked by `OutputProcessor.add_request`: what it says fits its variant. A client request
    with `n > 1` becomes n of these.

    `variant` is an index into the bundle's variants. `stop_token_ids` are final: the variant's end-of-text ids are
    already among them unless the client asked to ignore them.
    """

    request_id: SequenceId
    variant: int
    prompt_token_ids: list[int]
    sampling: TokenSampling
    num_encoder_tokens: int = 0  # the prompt's first tokens, which an encoder reads; after them the decoder starts
    stop_token_ids: list[int] = []
    banned: list[list[int]] = []  # tokens in a row that are not drawn, `SamplingParams.bad_words`
    grammar: str | None = None  # that the output follows, llguidance's text; checked
    cache_salt: str = ""  # separates tenants in the prefix cache
    qos: QoS = QoS()
    arrival_time: float = 0.0  # seconds, time.monotonic() of the machine

    @property
    def is_constrained(self) -> bool:
        """Whether it leaves out tokens."""
        return self.grammar is not None or bool(self.banned) or self.sampling.allowed_token_ids is not None

    @property
    def looks_back(self) -> bool:
        """Whether the next token depends on the tokens that the sequence has, beside the logits."""
        return self.sampling.penalises or bool(self.banned) or self.grammar is not None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities for one token: the token itself first, then the most probable ones (ties as torch.topk)."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the token itself, 1 = the most probable


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one engine step added to one request."""

    request_id: SequenceId
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one entry a new token
    # One entry for each prompt token but the first, sent with the first new token.
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_reason: int | None = None  # the stop token id that ended it
    nothing_allowed: bool = False  # ended by an error: what the request asks for leaves no token that may come next
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    # Seconds so far: waiting, prefill (scheduled to first token), decode.
    queue_time: float = 0.0
    prefill_time: float = 0.0
    decode_time: float = 0.0

    @classmethod
    def failed(cls, request_id: SequenceId, nothing_allowed: bool) -> "TokenOutput":
        """No token could be drawn."""
        return cls(request_id=request_id, new_token_ids=[], finish_reason="error", nothing_allowed=nothing_allowed)


class Logprob(msgspec.Struct, frozen=True):
    """One alternative to a token, as vLLM reports it."""

    logprob: float
    rank: int | None
    decoded_token: str | None


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One of the n sequences of a request."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RequestOutput(msgspec.Struct, kw_only=True):
    """A request with all its sequences; what `LLM.generate` returns, one for each prompt in order."""

    request_id: str
    variant: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # entry 0 is None
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    prompt_index: int = 0  # of a request with several prompts
