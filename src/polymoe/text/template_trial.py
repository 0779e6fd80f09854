"""A chat template is a program that came with a checkpoint: it is tried in a process that can be ended.

The process is a fork of this one, which costs milliseconds; it renders, writes its answer into a pipe, and ends.
"""

import contextlib
import importlib
import os
import resource
import select
import signal
import time
import warnings

import msgspec

from polymoe.errors import BundleError
from polymoe.text.chat_template import ChatTemplate, TemplateSource

_SECONDS = 10.0  # of all conversations; an ordinary template takes a thousandth
_BYTES = 512 << 20  # of memory, beyond what this process has
_MOST = 16 << 20  # bytes of the answer


class _Answer(msgspec.Struct):
    text: str = ""
    warning: str | None = None
    error: str | None = None


def try_template(source: TemplateSource, seconds: float = _SECONDS, size: int = _BYTES) -> tuple[str, str | None]:
    """As `ChatTemplate.trial`; it is only compiled there too, which works out what is constant in it.

    Raises `BundleError` for what is no template, or fails, or takes longer than `seconds` or more than `size` bytes.
    """
    importlib.import_module("transformers.utils.chat_template_utils")  # what rendering needs, before there are two
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child starts none
        pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            _limit(size)
            with os.fdopen(theirs, "wb") as pipe:
                pipe.write(msgspec.json.encode(_answer(source)))
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        answer = msgspec.json.decode(_read(ours, time.monotonic() + seconds), type=_Answer)
    except msgspec.DecodeError as error:
        raise BundleError("it ended the process that rendered a conversation") from error
    finally:
        os.close(ours)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if answer.error is not None:
        raise BundleError(answer.error)
    return answer.text, answer.warning


def _answer(source: TemplateSource) -> _Answer:
    try:
        text, warning = ChatTemplate(source).trial()
    except BundleError as error:
        return _Answer(error=str(error))
    except (MemoryError, RecursionError) as error:
        return _Answer(error=f"it cannot render a conversation ({type(error).__name__})")
    if len(text) > _MOST // 8:
        return _Answer(error=f"it writes {len(text)} characters for a conversation of a few words")
    return _Answer(text.encode("utf-8", "replace").decode(), warning)


def _limit(size: int) -> None:
    """It takes no more memory, writes no file and starts nothing."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + size,) * 2)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(kind, (0, 0))


def _read(pipe: int, deadline: float) -> bytes:
    """All of it. Raises `BundleError` when the time is over."""
    data = b""
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(pipe, 1 << 20)
        if not piece or len(data) > _MOST:
            return data
        data += piece
    raise BundleError("it takes too long to render a conversation")
