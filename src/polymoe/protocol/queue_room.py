"""Whether a queue takes more: asked by the client before it sends and by the engine, which decides."""

import math

from polymoe.errors import RequestError


def has_room(limit: int, total: int, own: int, share: float) -> bool:
    """Whether one more fits into a queue of `limit`. Beyond it a variant may still fill its own `share` (0 to 1) of
    the limit, so that the queue of one variant never shuts the others out; the queue stays below twice the limit.

    Args:
        total: entries in the queue, `own` of them of the variant that asks.
    """
    return total < limit or own < math.floor(limit * share)


def check_batch(prompts: int, n: int, limit: int) -> None:
    """Raises `RequestError` for more sequences than an empty queue holds: to try again would be in vain."""
    if prompts * n > limit:
        raise RequestError(
            f"The request asks for {prompts * n} sequences at once ({prompts} prompts, n = {n}) and this server queues "
            f"at most {limit}. Send fewer prompts in a request, or a smaller n.",
            param="prompt" if prompts > limit or n == 1 else "n",
        )
