"""Every error polymoe raises on purpose. Each message says what is wrong and what to do about it.

PolymoeError
├── CheckpointError               a checkpoint cannot be read: missing, pickle, truncated, left-over tensors
│   └── UnsupportedModelError     its architecture cannot be served; the message names the reason
├── FamilyError                   the checkpoints do not form one family
├── PlanError                     no plan fits what was asked (a budget below the minimum, too little disk)
├── BundleError                   not a bundle, an unfinished one, a damaged one or one of another version
├── ConfigError                   an option of the engine or the server is out of range
├── RequestError                  a request is wrong: `status`, `param` and `code` become the HTTP error body
│   ├── UnknownVariantError       404 model_not_found
│   ├── VariantUnusableError      503, its files in the bundle cannot be used; other variants are served
│   ├── NoProbabilitiesError      500, the model computed NaN
│   ├── NothingAllowedError       400, a grammar leaves no token
│   ├── ContextLengthError        400 context_length_exceeded
│   ├── OverloadedError           429, with the seconds to wait
│   └── ChangeRefusedError        422 (404, 409): the set of variants cannot be changed so; all is as before
└── EngineDeadError               the engine process ended; the server answers 503
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space, or choose a folder on another disk",
    errno.EFBIG: "the system allows no file of this size there; choose another folder",
    errno.EACCES: "choose another, or give yourself the right to use it",
    errno.EPERM: "choose another, or give yourself the right to use it",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class PolymoeError(Exception):
    """Base of all deliberate errors."""


class CheckpointError(PolymoeError):
    """A checkpoint cannot be read as it stands."""


class UnsupportedModelError(CheckpointError):
    """The architecture cannot be served; the message names it and the reason."""


class FamilyError(PolymoeError):
    """The given checkpoints do not form one family."""


class PlanError(PolymoeError):
    """No plan satisfies what was asked."""


class BundleError(PolymoeError):
    """A bundle cannot be opened."""


class ConfigError(PolymoeError):
    """An engine or server option is out of range."""


class RequestError(PolymoeError):
    """A request is invalid. `status`, `param` and `code` fill the OpenAI error body."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownVariantError(RequestError):
    """The `model` field names no variant that is served."""

    status = 404

    def __init__(self, name: str, known: list[str]) -> None:
        shown = name if len(name) <= 200 else name[:200] + "…"
        super().__init__(
            f"The model `{shown}` does not exist. Available models: {', '.join(known)}.",
            param="model",
            code="model_not_found",
        )


class VariantUnusableError(RequestError):
    """A variant cannot be served although others are. Its cause, a `BundleError`, has the details, which clients of a
    server are not to see."""

    status = 503
    type = "service_unavailable_error"

    def __init__(self, name: str, reason: str, details: str = "The server's log says more") -> None:
        self.reason = reason
        super().__init__(
            f"The model `{name}` is not served: {reason}. {details.rstrip('.')}; other models are not affected.",
            param="model",
            code="model_unusable",
        )


class NoProbabilitiesError(RequestError):
    """No token can be chosen: the model's output was NaN, the fault of its weights or of the dtype."""

    status = 500
    type = "internal_server_error"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The model `{name}` computed no probabilities (NaN) for this prompt, so there is no answer. "
            "Its weights are damaged, or the server's --dtype is too narrow for them.",
            param="model",
            code="no_probabilities",
        )


class NothingAllowedError(RequestError):
    """What the request asks for leaves no token that may come next."""

    def __init__(self) -> None:
        super().__init__(
            "The answer cannot go on: the request's structured output, allowed_token_ids or bad_words leave no token "
            "that may come next. A grammar contradicts itself, or takes too much work at this place; make it simpler.",
            code="nothing_allowed",
        )


class ContextLengthError(RequestError):
    """Prompt and requested tokens exceed the variant's context."""

    def __init__(self, limit: int, prompt_tokens: int, completion_tokens: int, param: str = "prompt") -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the {param}, {completion_tokens} in the "
            f"completion). Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )


class OverloadedError(RequestError):
    """A queue limit is reached; try again after `retry_after` seconds."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after


class ChangeRefusedError(RequestError):
    """The set of variants cannot be changed as asked; all is as before. 404 for what is not there, 409 for what another
    change or a name stands in the way of, else 422."""

    def __init__(self, message: str, *, status: int = 422, param: str | None = None, code: str = "refused") -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class EngineDeadError(PolymoeError):
    """The engine stopped; nothing in flight can finish."""


@contextmanager
def named(name: str, place: str | Path) -> Iterator[None]:
    """Errors from within say whose they are: the variant, and its path where they do not name it themselves."""
    try:
        yield
    except CheckpointError as error:
        where = "" if str(place) in str(error) else f"{place}: "
        raise type(error)(f"{name}: {where}{error}") from error


def explain(error: OSError) -> str:
    """An error of the operating system as one sentence: which file, what is wrong, and what to do about it."""
    if error.errno is None:  # raised by a library, with a message of its own
        return str(error)
    name = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno)
    return f"{name}{error.strerror or error}{'' if remedy is None else '; ' + remedy}."
