"""A bundle whose variants read tools: `base` in Hermes' format, `v1` in Qwen3-Coder's and thinking, `v2` not at all."""

from pathlib import Path

from families import make_family
from polymoe.offline.api import make_plan
from servers import CONTEXT

TURNS = """\
{%- for m in messages %}<{{ m.role }}>{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{%- if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}
{% endfor %}"""
TEMPLATES = {
    # Hermes' format; reads what a client may set.
    "base": "{% if tools %}Tools: {{ tools | tojson }} as <tool_call>{% endif %}{{ effort or reasoning_effort }}"
    + TURNS
    + "{% if add_generation_prompt %}<assistant>{% endif %}",
    # Qwen3-Coder's format, and begins the reasoning.
    "v1": "{% if tools %}{{ tools | tojson }} <tool_call>\n<function=NAME>{% endif %}"
    + TURNS
    + "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<think></think>{% else %}<think>\n"
    "{% endif %}{% endif %}",
    # Knows of no tools.
    "v2": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}


def make_tool_bundle(folder: Path) -> Path:
    """Random models of all bytes, so that anything can be written."""
    paths = make_family(
        "mixtral", folder / "checkpoints", num_variants=3, perturb=None, tokenizer=True, all_bytes=True,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    for name, template in TEMPLATES.items():
        (paths[name] / "chat_template.jinja").write_text(template)
    make_plan(paths, "separate", None, folder / "bundle")
    return folder / "bundle"
