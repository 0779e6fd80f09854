"""Which format of tool calls a variant writes."""

from polymoe.text.tools.base import ToolParser
from polymoe.text.tools.deepseek import DeepSeekParser, DeepSeekV3Parser
from polymoe.text.tools.dsml import DeepSeekV4Parser, DeepSeekV32Parser
from polymoe.text.tools.glm_xml import GlmXmlParser
from polymoe.text.tools.harmony import HarmonyParser
from polymoe.text.tools.hermes import HermesParser
from polymoe.text.tools.llama import LlamaParser
from polymoe.text.tools.mistral import MistralNamedParser, MistralParser
from polymoe.text.tools.qwen_xml import QwenXmlParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    parser.name: parser
    for parser in (
        HarmonyParser, DeepSeekV32Parser, DeepSeekV4Parser, DeepSeekParser, DeepSeekV3Parser, QwenXmlParser,
        GlmXmlParser, HermesParser, MistralNamedParser, MistralParser, LlamaParser,
    )
}  # fmt: skip


def choose_tool_parser(template: str) -> type[ToolParser] | None:
    """The one whose marks are in a chat template that reads tools; None for no such template."""
    if "tools" not in template:
        return None
    found = next((parser for parser in TOOL_PARSERS.values() if any(mark in template for mark in parser.marks)), None)
    if found is DeepSeekParser and any(mark in template for mark in DeepSeekV3Parser.marks):
        return DeepSeekV3Parser
    return found
