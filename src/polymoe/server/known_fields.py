"""Fields that other servers of this API know and this one does not implement, with the values that ask for nothing.

Clients often send every field they have, at its default. Those values (and null) are accepted; any other value is
refused by name, because a field that is accepted and then ignored is a wrong answer without an error. A field that a
request class declares is implemented there, whatever this list says.
"""

from collections.abc import Mapping
from typing import Any

Inert = Mapping[str, tuple[Any, ...]]  # field -> the values that ask for nothing

# Of OpenAI's completions and chat completions.
_OPENAI: Inert = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "suffix": (None, ""),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
# Of vLLM's sampling parameters and extra parameters, newer versions and older ones.
_VLLM: Inert = {
    "add_special_tokens": (None, False),
    "chat_template": (None,),
    "documents": (None, []),
    "early_stopping": (None, False),
    "ec_transfer_params": (None,),
    "echo": (None, False),
    "guided_choice": (None,),
    "guided_decoding_backend": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_whitespace_pattern": (None,),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "logprob_token_ids": (None,),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "prompt_embeds": (None,),
    "repetition_detection": (None,),
    "request_id": (None,),
    "return_mm_kwargs": (None, True),
    "return_prompt_text": (None, False),
    "return_token_offsets": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "routed_experts_prompt_start": (None, 0),
    "spaces_between_special_tokens": (None, True),
    "stream_interval": (None, 1),
    "structural_tag": (None,),
    "thinking_token_budget": (None, -1),
    "truncation_side": (None,),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
    "watermarking": (None, False),
}
OF_GENERATION: Inert = {**_OPENAI, **_VLLM}
# Older names of what is implemented under another.
INSTEAD: Mapping[str, str] = {
    "functions": "tools",
    "function_call": "tool_choice",
    "guided_choice": "structured_outputs with choice",
    "guided_grammar": "structured_outputs with grammar",
    "guided_json": "structured_outputs with json",
    "guided_regex": "structured_outputs with regex",
}

# Of chats, which completions do not know.
OF_COMPLETIONS: Inert = {
    **OF_GENERATION,
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "include_reasoning": (None, True),
    "parallel_tool_calls": (None, True, False),
    "reasoning_effort": (None,),
    "tool_choice": (None, "none"),
    "tools": (None, []),
}

OF_STRUCTURED_OUTPUTS: Inert = {
    "disable_additional_properties": (None, False),
    "disable_fallback": (None, False),
    "structural_tag": (None,),
    "whitespace_pattern": (None,),
}

OF_STREAM_OPTIONS: Inert = {"include_obfuscation": (None, False)}

# What openai-python's response messages carry besides role and content, so that they can be sent back as they are.
OF_MESSAGES: Inert = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
}

# Of the Responses API: what needs a memory of answers, tools that a server runs, or images.
OF_RESPONSES: Inert = {
    "access_programs": (None,),
    "background": (None, False),
    "background_options": (None,),
    "context_management": (None, []),
    "conversation": (None,),
    "image": (None,),
    "include": (None, []),
    "max_tool_calls": (None,),
    "moderation": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}
# What openai-python's items carry besides, so that an answer's items can be sent back as they are.
OF_RESPONSES_ITEMS: Inert = {
    "allowed_callers": (None, []),
    "annotations": (None, []),
    "async": (None, False),
    "async_": (None, False),  # as openai-python dumps it
    "caller": (None,),
    "defer_loading": (None, False),
    "encrypted_content": (None,),
    "logprobs": (None, []),
    "name": (None,),
    "namespace": (None,),
    "output_schema": (None,),
    "phase": (None, "final_answer"),
    "prompt_cache_breakpoint": (None,),
}
OF_TEXT: Inert = {"verbosity": (None, "medium")}
OF_REASONING: Inert = {
    "context": (None, "auto"),
    "generate_summary": (None,),
    "mode": (None, "standard"),
    "summary": (None,),
}

# Of the Messages API: what Anthropic's own service offers around a model.
OF_ANTHROPIC: Inert = {
    "container": (None,),
    "context_management": (None, {}),
    "diagnostics": (None,),
    "fallbacks": (None, []),
    "inference_geo": (None,),
    "mcp_servers": (None, []),
    "output_format": (None,),
    "speed": (None, "standard"),
    "user_profile_id": (None,),
    "workspace_id": (None,),
}
OF_ANTHROPIC_BLOCKS: Inert = {
    "caller": (None, {"type": "direct"}),
    "citations": (None, [], {"enabled": False}),
    "toolset_name": (None,),
}
OF_ANTHROPIC_TOOLS: Inert = {
    "allowed_callers": (None, [], ["direct"]),
    "defer_loading": (None, False),
    "input_examples": (None, []),
}
OF_THINKING: Inert = {"budget_tokens": (None,), "display": (None, "summarized")}
OF_OUTPUT_CONFIG: Inert = {"task_budget": (None,)}

OF_TOKENIZING: Inert = {
    "chat_template": (None,),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
}


def asks_for_nothing(value: Any, inert: tuple[Any, ...]) -> bool:
    """Whether `value` is one of `inert`, as JSON sees it: 1 is 1.0, but it is not true."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in inert)
