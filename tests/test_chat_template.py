"""Which shape of content a chat template reads, and what a request may tell it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from families import make_tokenizer
from polymoe.errors import RequestError
from polymoe.text.chat_template import ContentFormat
from polymoe.text.tokenizer import VariantTokenizer

TEXT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEXT_ONLY = "{% for m in messages %}{{ '[' + m.role + ']' + m['content'] }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
RENAMED = (
    "{% set turns = messages[0:] %}{% for m in turns | list %}{% set c = m.content %}[{{ m.role }}]"
    "{% for p in c %}{{ p['text'] }}{% endfor %}{% endfor %}"
)
INDEXED = "{% for m in messages %}[{{ m.role }}]{{ m.content[0].text }}{% endfor %}"
MACRO = (
    "{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}[{{ m.role }}]{{ show(m.content) }}{% endfor %}"
)
# Loops over the content of one role only; a list would be printed as Python writes it.
TOOLS_LOOP = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'tool' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# Refuses the conversation it is tried with; that it loops is all that is known.
DEMANDING = "{% if messages | length < 5 %}{{ raise_exception('more') }}{% endif %}" + PARTS


def tokenizer_with(folder: Path, template: str) -> VariantTokenizer:
    make_tokenizer(folder)
    fast = AutoTokenizer.from_pretrained(folder)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return VariantTokenizer(folder)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (TEXT, "string"), (TEXT_ONLY, "string"), (PARTS, "openai"), (EITHER, "openai"), (RENAMED, "openai"),
        (INDEXED, "openai"), (MACRO, "openai"), (TOOLS_LOOP, "string"), (DEMANDING, "openai"), ("nothing", "string"),
    ],
)  # fmt: skip
def test_content_comes_in_the_form_that_the_template_reads(tmp_path: Path, template: str, form: ContentFormat) -> None:
    """A template that loops over parts saw a text's letters, none of which has a type: the message was dropped and the
    answer was 200."""
    tokenizer = tokenizer_with(tmp_path, template)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.content_format == form
    if template in (DEMANDING, "nothing"):
        return
    as_text: list[dict[str, Any]] = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": None}]
    as_parts = [{"role": "user", "content": [{"type": "text", "text": "the dog"}]}, as_text[1]]
    assert tokenizer.render_chat(as_text) == tokenizer.render_chat(as_parts) == "[user]the dog[assistant]"


def test_several_parts_become_lines_where_text_is_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "dog"}]
    assert tokenizer_with(tmp_path, TEXT).render_chat([{"role": "user", "content": parts}]) == "[user]the\ndog"
    assert tokenizer_with(tmp_path, PARTS).render_chat([{"role": "user", "content": parts}]) == "[user]thedog"


def test_variables_for_the_template(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(
        tmp_path,
        "{{ messages[0].content }}{% if thinking %} think{% endif %}{% if add_generation_prompt %}:{% endif %}",
    )
    user = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(user) == "hi:"
    assert tokenizer.render_chat(user, {"thinking": True, "unread": [1]}) == "hi think:"
    assert tokenizer.render_chat(user, {"add_generation_prompt": False}) == "hi"
    for name in ("messages", "chat_template", "tokenize", "conversation"):
        with pytest.raises(RequestError, match=f"cannot set {name}") as refused:
            tokenizer.render_chat(user, {name: "x"})
        assert refused.value.param == "chat_template_kwargs"


def test_a_template_with_an_error_takes_nothing_from_completions(tmp_path: Path) -> None:
    """Bundles from before planning tried templates may hold one."""
    tokenizer = tokenizer_with(tmp_path, "{% for")
    assert not tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode("the dog")) == "the dog"
    with pytest.raises(RequestError, match="chat template of this variant cannot be used"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
