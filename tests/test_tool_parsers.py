"""Each format of tool calls, with the examples of the models' cards and templates, whole and letter by letter."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from families import make_tokenizer
from polymoe.protocol.structured_outputs import StructuredOutputsParams
from polymoe.text.grammar import answer_after
from polymoe.text.reasoning import ReasoningMarks, ReasoningSplitter, reasoning_marks
from polymoe.text.tools.base import Arguments, Call, Event, Text, Thought
from polymoe.text.tools.choose import TOOL_PARSERS, choose_tool_parser
from polymoe.text.tools.harmony import HarmonyParser
from polymoe.text.tools.lark import Token

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["c", "f"]},
        "days": {"type": "integer"},
        "where": {"type": "object"},
    },
    "required": ["city"],
}
TOOLS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "now": {}}
PARIS = ("get_weather", {"city": "Paris"})
DEEP = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)


def qwen(name: str, **values: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def glm(name: str, **values: str) -> str:
    inside = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items())
    return f"<tool_call>{name}\n{inside}</tool_call>"


def deep(*calls: str) -> str:
    begin, call, _, end, close = DEEP
    return begin + "\n".join(call + text + end for text in calls) + close


def dsml(outer: str, *calls: tuple[str, list[tuple[str, bool, str]]]) -> str:
    text = f"<｜DSML｜{outer}>\n"
    for name, arguments in calls:
        text += f'<｜DSML｜invoke name="{name}">\n'
        for key, is_text, value in arguments:
            text += f'<｜DSML｜parameter name="{key}" string="{str(is_text).lower()}">{value}</｜DSML｜parameter>\n'
        text += "</｜DSML｜invoke>\n"
    return text + f"</｜DSML｜{outer}>"


# format, answer, its text, its calls
EXAMPLES: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", "Just text with a < b.", "Just text with a < b.", []),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
    (
        "hermes",
        'I look.\n<tool_call>\n{"arguments": {"city": "Paris", "where": {"a": [1, "}"]}}, "name": "get_weather"}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n',
        "I look.\n",
        [("get_weather", {"city": "Paris", "where": {"a": [1, "}"]}}), ("now", {})],
    ),
    ("hermes", r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}</tool_call>', "", [PARIS]),
    (
        "hermes",
        '<tool_call>{"name": "now", "parameters": {"a": "</tool_call>"}}</tool_call>',
        "",
        [("now", {"a": "</tool_call>"})],
    ),
    ("hermes", "<tool_call> is a tag", "<tool_call> is a tag", []),
    ("hermes", '<tool_call>{"nome": 3}</tool_call> and on', '<tool_call>{"nome": 3}</tool_call> and on', []),
    (
        "qwen_xml",
        "Sure.\n\n" + qwen("get_weather", city='New "York"\nUSA', unit="c", days="3", where='{"x": 1}'),
        "Sure.\n\n",
        [("get_weather", {"city": 'New "York"\nUSA', "unit": "c", "days": 3, "where": {"x": 1}})],
    ),
    ("qwen_xml", qwen("now") + "\n" + qwen("get_weather", city="5"), "", [("now", {}), ("get_weather", {"city": "5"})]),
    ("qwen_xml", "<function=now>\n</function>\n</tool_call>", "", [("now", {})]),
    ("glm_xml", glm("get_weather", city="北京", days="2"), "", [("get_weather", {"city": "北京", "days": 2})]),
    ("glm_xml", "<tool_call>now</tool_call>" + glm("now"), "", [("now", {}), ("now", {})]),
    (
        "glm_xml",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>",
        "",
        [PARIS],
    ),
    ("deepseek_v3", deep(f'function{DEEP[2]}get_weather\n```json\n{{"city": "Paris"}}\n```'), "", [PARIS]),
    (
        "deepseek",
        "Wait." + deep(f'get_weather{DEEP[2]}{{"city": "Paris"}}', f"now{DEEP[2]}{{}}"),
        "Wait.",
        [PARIS, ("now", {})],
    ),
    (
        "deepseek_v32",
        "Wait.\n\n"
        + dsml("function_calls", ("get_weather", [("city", True, 'New "York" </b>'), ("days", False, "3")])),
        "Wait.\n\n",
        [("get_weather", {"city": 'New "York" </b>', "days": 3})],
    ),
    (
        "deepseek_v32",
        dsml("function_calls", ("now", []), ("get_weather", [("city", True, "5"), ("where", False, '{"a": [1]}')])),
        "",
        [("now", {}), ("get_weather", {"city": "5", "where": {"a": [1]}})],
    ),
    (
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n{"city": "Paris"}\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        "",
        [PARIS],
    ),
    ("deepseek_v4", dsml("tool_calls", ("get_weather", [("city", True, "Paris")])), "", [PARIS]),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (
        "llama",
        '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Paris"}}',
        "",
        [("now", {}), PARIS],
    ),
    ("llama", '{"name": "Ada", "parameters": 36}', '{"name": "Ada", "parameters": 36}', []),
    ("llama", 'It is {"name": "now", "parameters": {}}.', 'It is {"name": "now", "parameters": {}}.', []),
    ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Paris"}}]',
        "",
        [("now", {}), PARIS],
    ),
    (
        "mistral_named",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]1a[ARGS]{}',
        "",
        [PARIS, ("now", {})],
    ),
    ("mistral_named", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", [PARIS]),
    (
        "harmony",
        "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        "",
        [PARIS],
    ),
    (
        "harmony",
        '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        "",
        [PARIS],
    ),
    ("harmony", "<|channel|>final<|message|>2 + 2 = 4.<|return|>", "2 + 2 = 4.", []),
]


def read(name: str, pieces: Iterable[str]) -> list[Event]:
    parser = TOOL_PARSERS[name](TOOLS)
    events = [event for piece in pieces for event in parser.push(piece)]
    return events + parser.finish()


def summed(events: list[Event]) -> tuple[str, list[tuple[str, Any]]]:
    names = [event.name for event in events if isinstance(event, Call)]
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, Arguments):
            arguments[event.index] += event.text
    text = "".join(event.text for event in events if isinstance(event, Text))
    return text, [(name, json.loads(found)) for name, found in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(("name", "answer", "text", "calls"), EXAMPLES)
def test_examples(name: str, answer: str, text: str, calls: list[tuple[str, Any]]) -> None:
    assert summed(read(name, [answer])) == (text, calls)
    assert summed(read(name, answer)) == (text, calls)
    for size in (2, 3, 7):
        assert summed(read(name, [answer[i : i + size] for i in range(0, len(answer), size)])) == (text, calls)


@pytest.mark.parametrize(("name", "answer"), [(name, answer) for name, answer, _, _ in EXAMPLES])
def test_an_answer_that_is_cut_off_anywhere_is_read_to_there(name: str, answer: str) -> None:
    """Nothing hangs and nothing raises; what is given out early stays true."""
    for end in range(len(answer)):
        before = read(name, [answer[:end]])
        assert sum(isinstance(event, Call) for event in before) <= sum(
            isinstance(event, Call) for event in read(name, [answer])
        )


def test_arguments_come_while_they_are_written() -> None:
    for name, answer in (
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a very long name'),
        ("qwen_xml", "<tool_call>\n<function=get_weather>\n<parameter=city>\na very long name"),
        ("glm_xml", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>a very long name"),
        ("deepseek", deep(f'get_weather{DEEP[2]}{{"city": "a very long name')[: -len(DEEP[3] + DEEP[4])]),
        ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "a very long name'),
        ("llama", '{"name": "get_weather", "parameters": {"city": "a very long name'),
        ("deepseek_v32", dsml("function_calls", ("get_weather", [("city", True, "a very long name")])).split("</")[0]),
        ("harmony", '<|channel|>commentary to=functions.get_weather<|message|>{"city": "a very long name'),
    ):
        parser = TOOL_PARSERS[name](TOOLS)
        events = parser.push(answer)
        assert Call(0, "get_weather") in events
        assert "a very long na" in "".join(event.text for event in events if isinstance(event, Arguments)), name


def test_harmony_thinks_in_a_channel() -> None:
    events = read("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes")
    assert "".join(event.text for event in events if isinstance(event, Thought)) == "Hm."
    assert summed(events)[0] == "Yes"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    fast = make_tokenizer(tmp_path_factory.mktemp("tokenizer"), all_bytes=True)
    return LLTokenizer(fast.backend_tokenizer.to_str(), eos_token=[1])


def matches(tokenizer: LLTokenizer, grammar: str, text: str) -> bool:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(("name", "answer", "text", "calls"), EXAMPLES)
def test_what_forced_calls_may_look_like(
    tokenizer: LLTokenizer, name: str, answer: str, text: str, calls: list[tuple[str, Any]]
) -> None:
    """A grammar lets the format's own examples pass, and nothing that is no call."""
    grammar = TOOL_PARSERS[name].grammar(TOOLS, True, Token({}))
    assert not matches(tokenizer, grammar, "Just text.")
    usual = not text and all(key in WEATHER["properties"] for _, values in calls for key in values)  # type: ignore[operator]
    odd = (
        'arguments": "' in answer
        or answer.startswith(
            ("<function", "<|start|>", "<tool_call>now<", "<tool_call>get_weather<", "[TOOL_CALLS]get_weather{")
        )
        or "CALL_ID" in answer
        or answer.startswith("<|python_tag|>")
        or '">\n{' in answer
    )
    if calls and usual and not odd and name != "harmony":
        assert matches(tokenizer, grammar, answer), grammar
        assert not matches(tokenizer, grammar, answer.replace("get_weather", "get_wether").replace("now", "new"))
        if len(calls) == 2:
            assert not matches(tokenizer, TOOL_PARSERS[name].grammar(TOOLS, False, Token({})), answer)


def test_forced_calls_where_the_marker_is_a_special_token(tmp_path: Path) -> None:
    """Any text can be an argument then too, what looks like the beginning of the end included."""
    fast = make_tokenizer(tmp_path, all_bytes=True)
    fast.add_special_tokens({"additional_special_tokens": ["｜DSML｜"]})
    special = {"｜DSML｜": fast.convert_tokens_to_ids("｜DSML｜")}
    tokenizer = LLTokenizer(fast.backend_tokenizer.to_str(), eos_token=[1])
    grammar = TOOL_PARSERS["deepseek_v32"].grammar(TOOLS, True, Token(special))
    for city in ("Paris", "a < b", "<b></b>", "</", ""):
        answer = dsml("function_calls", ("get_weather", [("city", True, city), ("unit", True, "c")]), ("now", []))
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        ids = fast(answer, add_special_tokens=False)["input_ids"]
        assert ids.count(special["｜DSML｜"]) == 10
        assert matcher.try_consume_tokens(ids) == len(ids), (city, matcher.get_error())
        assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, '{"a": 1}'),
        ({"json_object": True, "disable_any_whitespace": True}, '{"a":[]}'),
        ({"regex": "[a-c]+/d"}, "abc/d"),
        ({"choice": ["yes", "no"]}, "no"),
        ({"grammar": 'start: "x" y\ny: "y"+'}, "xyy"),
    ],
)
def test_a_structured_answer_comes_after_the_thought(tokenizer: LLTokenizer, fields: Any, answer: str) -> None:
    params = StructuredOutputsParams(**fields)
    wanted = answer_after(params, *ReasoningMarks("<think>", "</think>").rest_of_thought(Token({})))
    assert wanted.grammar is not None
    assert matches(tokenizer, wanted.grammar, f"Hm, {{}} 1 < 2\n</think>\n\n{answer}")
    assert not matches(tokenizer, wanted.grammar, answer)
    assert not matches(tokenizer, wanted.grammar, "Hm</think>\n\nHm")
    harmony = answer_after(params, *HarmonyParser.before_answer(Token({})))
    assert harmony.grammar is not None
    final = f"<|channel|>final<|message|>{answer}"
    assert matches(tokenizer, harmony.grammar, final)
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert matches(tokenizer, harmony.grammar, thought + final)
    assert not matches(tokenizer, harmony.grammar, answer)


def test_templates_tell_the_format() -> None:
    for name, parser in TOOL_PARSERS.items():
        begin = "<｜tool▁call▁begin｜>" if name == "deepseek_v3" else ""
        found = choose_tool_parser(f"{{% for tool in tools %}}{begin}{parser.marks[0]}")
        assert found is not None
        assert found.name == name
    assert choose_tool_parser("<tool_call> {{ messages }}") is None
    assert choose_tool_parser("{{ tools }} only") is None


@pytest.mark.parametrize(
    ("text", "is_open", "thought", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nYes", False, "Hm.", "Yes"),
        ("Hm.\n\nHa.</think>Yes\n", True, "Hm.\n\nHa.", "Yes\n"),
        ("\n<think></think>Yes", False, "", "Yes"),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        ("Still thinking", True, "Still thinking", ""),
        ("<thin", False, "", "<thin"),
        ("", True, "", ""),
    ],
)
def test_thoughts_and_answers(text: str, is_open: bool, thought: str, answer: str) -> None:
    marks = ReasoningMarks("<think>", "</think>")
    for size in (1, 2, 5, 100):
        splitter = ReasoningSplitter(marks, is_open)
        found = [splitter.push(text[i : i + size]) for i in range(0, len(text), size)]
        found.append(splitter.push("", last=True))
        assert ("".join(a for a, _ in found), "".join(b for _, b in found)) == (thought, answer)
    assert reasoning_marks("{{ x.split('</think>') }}") == marks
    assert marks.is_open("<think>a</think><think>\n")
    assert not marks.is_open("<think>a</think>\n")
