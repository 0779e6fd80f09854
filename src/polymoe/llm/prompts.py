"""What the Python interface takes as a prompt, and the checks that a type checker cannot make for everybody."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

from polymoe.client.output import OutputProcessor
from polymoe.errors import RequestError, VariantUnusableError
from polymoe.protocol.request import SamplingParams, sampling_params
from polymoe.text.control_tokens import unmarked

Prompt = str | Sequence[int]  # a text, or token ids
Messages = Sequence[Mapping[str, Any]]  # a conversation: {"role": …, "content": …} each


def as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several -> a list; a flat list of token ids is one prompt. Raises `RequestError`."""
    if is_prompt(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise _no_prompt(prompts)
    for prompt in prompts:
        if not is_prompt(prompt) and prompt != []:  # the latter is refused as every empty prompt is
            raise _no_prompt(prompt)
    return list(prompts)


def as_conversations(messages: Any) -> list[Messages]:
    """One conversation or several -> a list. Raises `RequestError`."""
    if is_conversation(messages):
        return [messages]
    if not isinstance(messages, Sequence) or not all(is_conversation(conversation) for conversation in messages):
        raise RequestError(
            'messages must be a conversation, [{"role": "user", "content": "…"}, …], or a list of conversations, got '
            f"{_shown(messages)}.",
            param="messages",
        )
    return list(messages)


def is_prompt(value: Any) -> TypeGuard[Prompt]:
    if isinstance(value, str):
        return True
    listed = isinstance(value, Sequence) and not isinstance(value, bytes) and len(value) > 0
    return listed and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def is_conversation(value: Any) -> TypeGuard[Messages]:
    return isinstance(value, Sequence) and len(value) > 0 and all(_is_message(message) for message in value)


def encode_prompt(processor: OutputProcessor, variant: str, prompt: Prompt | Messages) -> tuple[str | None, list[int]]:
    """(text if there is any, token ids); of a conversation as `encode_conversation`. Raises `RequestError`."""
    if isinstance(prompt, str):
        with _details(variant):
            tokenizer = processor.require_tokenizer(variant, "a text prompt")
        return prompt, tokenizer.encode(prompt)
    if is_conversation(prompt):
        return encode_conversation(processor, variant, prompt)
    if is_prompt(prompt) or prompt == []:
        return None, list(prompt)
    raise _no_prompt(prompt)


def encode_conversation(
    processor: OutputProcessor, variant: str, messages: Messages, template_arguments: Mapping[str, Any] | None = None
) -> tuple[str, list[int]]:
    """(the text that the variant's chat template makes, token ids). Raises `RequestError`."""
    with _details(variant):
        tokenizer = processor.require_tokenizer(variant, "a chat", "messages")
    text = tokenizer.render_marked([{"content": None, **message} for message in messages], template_arguments)
    return unmarked(text), tokenizer.encode_rendered(text)


def default_sampling_params(processor: OutputProcessor, variant: str) -> SamplingParams:
    """What the variant's generation config recommends. Raises `UnknownVariantError`."""
    return sampling_params(processor.variant(variant).generation, {})


def the_variant(processor: OutputProcessor, name: str | None) -> str:
    """`name`, or the only one there is. Raises `RequestError` for no name where there are several, and for a name that
    is unknown (`UnknownVariantError`)."""
    if name is None:
        names = list(processor.variants)
        if len(names) > 1:
            raise RequestError(f"say which of the variants: {', '.join(names)}.", param="variants")
        return names[0]
    with _details(name):
        processor.variant(name)
    return name


@contextmanager
def _details(variant: str) -> Iterator[None]:
    """Who calls from Python is the operator too, and may know what the log of a server would say."""
    try:
        yield
    except VariantUnusableError as error:
        raise VariantUnusableError(variant, error.reason, str(error.__cause__)) from error.__cause__


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def _no_prompt(value: object) -> RequestError:
    return RequestError(f"a prompt must be a text or a list of token ids, got {_shown(value)}.", param="prompts")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
