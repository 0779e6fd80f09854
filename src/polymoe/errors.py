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
│   ├── ContextLengthError        400 context_length_exceeded
│   └── OverloadedError           429, with the seconds to wait
└── EngineDeadError               the engine process ended; the server answers 503
"""

import errno

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


class ContextLengthError(RequestError):
    """Prompt and requested tokens exceed the variant's context."""

    def __init__(self, limit: int, prompt_tokens: int, completion_tokens: int) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the messages, {completion_tokens} in the "
            "completion). Please reduce the length of the messages or completion.",
            param="messages",
            code="context_length_exceeded",
        )


class OverloadedError(RequestError):
    """A queue limit is reached; try again after `retry_after` seconds."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after


class EngineDeadError(PolymoeError):
    """The engine stopped; nothing in flight can finish."""


def explain(error: OSError) -> str:
    """An error of the operating system as one sentence: which file, what is wrong, and what to do about it."""
    if error.errno is None:  # raised by a library, with a message of its own
        return str(error)
    name = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno)
    return f"{name}{error.strerror or error}{'' if remedy is None else '; ' + remedy}."
