"""What an engine tells of itself, once at the start and again and again while it runs. Imports no torch."""

import msgspec

from polymoe.bundle.manifest import Fidelity
from polymoe.errors import ContextLengthError, RequestError
from polymoe.protocol.fast_path import FastPath

# Tokens: upper bounds, inclusive.
STEP_TOKENS_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class VariantInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What clients may know of a variant."""

    name: str
    version: str
    max_model_len: int  # tokens
    vocab_size: int
    root: str  # the checkpoint it was planned from
    created: int  # seconds since the epoch
    tokenizer_dir: str | None
    eos_token_ids: list[int]  # of its configs; its tokenizer may know one more
    generation: dict[str, int | float | list[str]]  # field of `SamplingParams` -> its own default
    predicted_error: float | None = None  # nats a token, what the planner expected; None: it predicted nothing
    fidelity: Fidelity | None = None  # to its original, as measured when it was planned
    decoder_start_token_id: int | None = None  # of an encoder–decoder model, whose prompts go to the encoder
    place: int = 0  # what requests to the engine call it
    device_bytes: int = 0  # what only it has on the device, where that is known
    fault: str | None = None  # why it cannot be served although others can; with paths, for the operator

    @property
    def key(self) -> str:
        """Names this version and no other."""
        return f"{self.name}@{self.version}"

    @property
    def encodes_prompts(self) -> bool:
        """Whether an encoder reads them; it and its decoder have half of `max_model_len` each."""
        return self.decoder_start_token_id is not None

    def max_new_tokens(self, num_prompt_tokens: int) -> int:
        """Most tokens that can follow a prompt."""
        return self.max_model_len // 2 - 1 if self.encodes_prompts else self.max_model_len - num_prompt_tokens

    def most_prompt_tokens(self, max_tokens: int) -> int:
        """Longest prompt that leaves room for `max_tokens` more; at least 1."""
        return self.max_model_len // 2 if self.encodes_prompts else max(1, self.max_model_len - max_tokens)

    def check_room(self, num_prompt_tokens: int, max_tokens: int, scores_prompt: bool) -> None:
        """Raises `RequestError` for a prompt whose log-probabilities nobody computes, and for too many tokens."""
        if self.encodes_prompts:
            if scores_prompt:
                raise RequestError(
                    f"`{self.name}` is an encoder–decoder model: its prompt has no log-probabilities (echo, "
                    "prompt_logprobs).",
                    param="echo",
                )
            if num_prompt_tokens > (most := self.most_prompt_tokens(max_tokens)):
                raise RequestError(
                    f"The prompt has {num_prompt_tokens} tokens; the encoder of `{self.name}` reads at most {most}.",
                    param="prompt",
                )
        if max_tokens > self.max_new_tokens(num_prompt_tokens):
            raise ContextLengthError(self.max_model_len, num_prompt_tokens, max_tokens)

    def check_echo(self) -> None:
        """Raises `RequestError` where the answer does not go on from the prompt."""
        if self.encodes_prompts:
            raise RequestError(f"`{self.name}` is an encoder–decoder model: it cannot echo its prompt.", param="echo")


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided at start-up."""

    variants: list[VariantInfo]
    names: dict[str, int] = {}  # what `model` may be -> the place of what it means; empty: every variant its own name
    policy: str
    resident_bytes: dict[str, int]
    slots: int
    num_kv_blocks: int
    block_size: int
    experts_resident: int
    experts_absent: int
    max_concurrency: float  # sequences of full length that the KV cache holds
    device: str
    dtype: str
    prefix_caching: bool = True
    max_variants: int = 0  # versions that may be held at once; 0: those that were planned, and no others
    headroom: int | None = None  # bytes for what is added; None: what is free
    fast_paths: list[FastPath] = []  # what every operation runs on, and why not on something faster
    device_bytes: int | None = None  # all of the device's memory; None: not known
    workspace_bytes: int = 0  # kept free on a GPU for what a step computes


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the start, gauges of now. Lists are per name of a variant, in the order of `names`; times are
    seconds."""

    names: list[str]
    in_flight: dict[str, int]  # version -> sequences that run or wait
    added_bytes: int  # on the device, of variants that were added
    running: list[int]
    waiting: list[int]
    kv_usage: float
    prefix_cache_queries: list[int]  # tokens
    prefix_cache_hits: list[int]  # tokens
    preemptions: list[int]
    tokens_served: list[int]  # computed, of prompts and answers
    deadline_misses: list[int]  # first tokens that came later than the request's SLO class says
    reconfigurations: int
    reconfiguration_seconds: float
    reconfiguration_bytes: int
    expert_hits: int
    expert_misses: int
    expert_host_bytes: int
    expert_fetch_seconds: float
    resident_bytes: dict[str, int]
    # Tokens routed since they were last asked for, of a part of the steps: little-endian uint32 [V, L, E].
    routing: bytes | None = None
    # Steps by the tokens that they computed, a count for each of `STEP_TOKENS_BOUNDS` and one for what is above.
    step_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKENS_BOUNDS) + 1)
    step_tokens_sum: int = 0
    loaded: list[int] = []  # indices of `names` whose non-experts are in a slot now
