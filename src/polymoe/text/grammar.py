"""What an answer has to look like, as llguidance's grammars, and whether they can be compiled within limits."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from polymoe.errors import BundleError, RequestError
from polymoe.protocol.structured_outputs import StructuredOutputsParams
from polymoe.text.tokenizer import VariantTokenizer

# Together they keep compiling under about a second and a step of a sequence under some 20 milliseconds, whatever the
# schema. Within them is an object of 2,000 optional properties.
MAX_GRAMMAR_CHARS = 128 << 10
_MAX_SYMBOLS = 25_000
_MAX_ROW_ITEMS = 10_000
# A model that has lost its thread would write line breaks for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_MAX_SEARCH_SECONDS = 0.5
_MAX_PLACES = 256
_SHOWN = 400  # characters of the library's message

# Keywords whose value is a schema, a list of them, or names with one each.
_SCHEMA = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def parser_limits() -> LLParserLimits:
    """A new one each time: messages without a dump of the parser's state."""
    return LLParserLimits(max_grammar_size=_MAX_SYMBOLS, max_items_in_row=_MAX_ROW_ITEMS, verbose_errors=False)


def grammar_text(wanted: StructuredOutputsParams) -> str:
    """`wanted` in llguidance's own form.

    Raises `RequestError` for what is too long or no JSON or GBNF. `check_grammar` says whether the rest is right.
    """
    if wanted.json is not None or wanted.json_object:
        schema = {"type": "object"} if wanted.json is None else _schema(wanted.json)
        return json_grammar(schema, wanted.disable_any_whitespace)
    if wanted.regex is not None:
        return _within_limit(LLMatcher.grammar_from_regex, wanted.regex)
    if wanted.choice is not None:
        return _within_limit(lambda text: grammar_from("choice", text), json.dumps(wanted.choice))
    assert wanted.grammar is not None
    try:
        return _within_limit(lambda text: grammar_from("grammar", text), wanted.grammar)
    except ValueError as error:
        raise _refused(f"The grammar cannot be read: {str(error)[:_SHOWN]}.") from error


def json_grammar(schema: Any, disable_any_whitespace: bool = False) -> str:
    """A JSON schema in llguidance's form."""
    options: dict[str, Any] = {"whitespace_pattern": _WHITESPACE}
    if disable_any_whitespace:
        options = {"whitespace_flexible": False}

    def convert(text: str) -> str:
        return LLMatcher.grammar_from_json_schema(text, defaults=options)  # type: ignore[arg-type]

    try:
        return _within_limit(convert, json.dumps(schema))
    except (ValueError, RecursionError) as error:  # nested beyond what the library reads
        raise _refused(f"The JSON schema cannot be read: {str(error)[:_SHOWN]}.") from error


def answer_after(wanted: StructuredOutputsParams, lead: str, rules: str) -> StructuredOutputsParams:
    """`wanted`, once the model has written what comes before an answer: `lead`, with its `rules`, in Lark. Raises
    `RequestError`."""
    spaces = (
        {"whitespace_pattern": _WHITESPACE} if not wanted.disable_any_whitespace else {"whitespace_flexible": False}
    )
    if wanted.json is not None or wanted.json_object:
        schema = {"type": "object"} if wanted.json is None else _schema(wanted.json)
        if not isinstance(schema, dict):
            raise _refused("The JSON schema must be an object.")
        answer = f"answer: %json {json.dumps({'x-guidance': spaces} | schema)}\n"
    elif wanted.regex is not None:
        answer = f"answer: /{wanted.regex.replace('/', chr(92) + '/')}/\n"
    elif wanted.choice is not None:
        answer = "answer: " + " | ".join(map(json.dumps, wanted.choice)) + "\n"
    else:
        assert wanted.grammar is not None
        if not wanted.grammar.startswith("start:"):
            raise _refused("A grammar for a model that thinks first must begin with its rule `start:`.")
        answer = "answer:" + wanted.grammar.removeprefix("start:")
    text = f"start: {lead} answer\n{rules}{answer}"
    return StructuredOutputsParams(grammar=text)


def check_grammar(text: str, wanted: StructuredOutputsParams | None, tokenizer: LLTokenizer | None) -> None:
    """Compile and forget. Takes up to a second, for most of which the interpreter's lock is free.

    Args: wanted: where `text` comes from. tokenizer: for grammars that name special tokens.

    Raises `RequestError` that says what is wrong, and where in a JSON schema.
    """
    if not (fault := _fault(text, tokenizer)):
        return
    if wanted is None or wanted.json is None:
        raise _refused(f"The structured output cannot be compiled: {fault}.")
    place = _place(_schema(wanted.json))
    raise _refused(f"The JSON schema cannot be compiled{f' at {place}' if place else ''}: {fault}.")


def llguidance_tokenizer(tokenizer: VariantTokenizer, vocab_size: int, end_token_ids: list[int]) -> LLTokenizer:
    """Takes about a second for a large vocabulary.

    Args: vocab_size: width of the masks. end_token_ids: what may follow where a grammar may end; at least one.

    Raises `BundleError` for a tokenizer that cannot be constrained.
    """
    source = tokenizer.to_json()
    if source is None:
        raise BundleError("it is none of the fast tokenizers, whose files list all tokens")
    try:
        return LLTokenizer(source, n_vocab=vocab_size, eos_token=end_token_ids)
    except (ValueError, RuntimeError) as error:
        raise BundleError(str(error)) from error


def _within_limit(convert: Callable[[str], str], text: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise _refused(
            f"The structured output has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are compiled.",
        )
    return convert(text)


def _schema(given: str | dict[str, Any]) -> Any:
    if not isinstance(given, str):
        return given
    if len(given) > 2 * MAX_GRAMMAR_CHARS:
        raise _refused(f"The JSON schema has {len(given)} characters; at most {MAX_GRAMMAR_CHARS} are compiled.")
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise _refused(f"The JSON schema is not valid JSON: {str(error)[:_SHOWN]}.") from error


def _fault(text: str, tokenizer: LLTokenizer | None) -> str:
    """What is wrong with a grammar; empty if nothing is."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(text, tokenizer, limits=parser_limits())
    return messages[0].strip().rstrip(".")[:_SHOWN] if failed else ""


def _place(schema: Any) -> str:
    """Where the fault is: the path of the innermost part that cannot be compiled by itself either; empty: unknown.

    The library does not say. Only who sends a wrong schema waits for the search, and not for long.
    """
    deadline = time.monotonic() + _MAX_SEARCH_SECONDS
    shared = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
    path: list[str] = []
    tried = 0
    while True:
        for step, part in _parts(schema):
            tried += 1
            if tried > _MAX_PLACES or time.monotonic() > deadline:
                return ".".join(path)
            if isinstance(part, dict) and _fault(json_grammar({**shared, **part}), None):
                path.append(step)
                schema = part
                break
        else:
            return ".".join(path)


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, dict):
        return
    for key in _SCHEMA:
        if key in schema:
            yield key, schema[key]
    for key in _SCHEMAS:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}.{i}", part) for i, part in enumerate(schema[key]))
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            yield from ((f"{key}.{name}", part) for name, part in schema[key].items())


def _refused(message: str) -> RequestError:
    return RequestError(message, param="structured_outputs", code="invalid_value")
