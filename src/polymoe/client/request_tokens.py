"""What a request asks of the engine: which tokens, checked, and how they are drawn."""

import itertools
from collections.abc import Iterable

import msgspec

from polymoe.errors import RequestError
from polymoe.protocol.info import VariantInfo
from polymoe.protocol.request import SamplingParams, TokenSampling


def fitted(sampling: SamplingParams, room: int) -> SamplingParams:
    """With `max_tokens` lowered to `room`, what the context has left, for who did not ask for any."""
    most = max(1, min(sampling.max_tokens, room))
    return msgspec.structs.replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))


def token_sampling(sampling: SamplingParams, k: int) -> TokenSampling:
    """What the engine needs for the k-th of n sequences: another seed, and the prompt's logprobs only once."""
    values = {name: getattr(sampling, name) for name in TokenSampling.__struct_fields__}
    if k > 0:
        values["prompt_logprobs"] = None
        if (seed := sampling.seed) is not None:
            skipped = seed < -1 <= seed + k  # -1 is no seed
            values["seed"] = (seed + k + skipped + 2**63) % 2**64 - 2**63
    return TokenSampling(**values)


def check_tokens(info: VariantInfo, token_ids: list[int], sampling: SamplingParams) -> None:
    """Raises `RequestError` unless the engine can run this prompt on this variant. Nobody checks it again."""
    if not token_ids:
        raise RequestError("The prompt is empty; it needs at least one token.", param="prompt")
    info.check_room(len(token_ids), sampling.max_tokens, sampling.prompt_logprobs is not None)
    named: dict[str, Iterable[int]] = {
        "prompt": token_ids,
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": sampling.logit_bias,
    }
    named["allowed_token_ids"] = sampling.allowed_token_ids or []
    for param, ids in named.items():
        for token_id in itertools.filterfalse(range(info.vocab_size).__contains__, ids):
            raise RequestError(
                f"Token id {token_id} is outside the vocabulary of `{info.name}` (0 to {info.vocab_size - 1}).",
                param=param,
            )
