"""What a starting server tells its operator."""

import json

from polymoe.client.client import AsyncEngineClient
from polymoe.config import format_bytes
from polymoe.console import Console, warn
from polymoe.protocol.fast_path import FastPath
from polymoe.protocol.info import EngineInfo, VariantInfo
from polymoe.server.settings import ServerSettings


def print_summary(console: Console, client: AsyncEngineClient, host: str, port: int, settings: ServerSettings) -> None:
    """Variants, what is resident, what fits, where to connect, and a curl line that works."""
    info = client.info
    width = max(len(variant.name) for variant in info.variants)
    lines = [f"{len(client.processor.served)} variants, policy {info.policy}, {info.dtype} on {info.device}"]
    lines += [
        f"  {variant.name:<{width}}  version {variant.version[:12]}  {variant.max_model_len} tokens of context"
        f"{_fidelity(variant)}"
        for variant in client.processor.served
    ]
    faults = client.processor.faults
    lines += [f"  {name:<{width}}  is NOT SERVED: {fault.reason} ({fault.details})" for name, fault in faults.items()]
    sizes = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in info.resident_bytes.items())
    lines += [
        f"experts   {info.experts_resident} resident, {info.experts_absent} absent",
        *_fast_paths(info.fast_paths),
        f"slots     {info.slots} for {len(info.variants)} variants",
        f"memory    {sizes}",
        f"KV cache  {info.num_kv_blocks * info.block_size} tokens, "
        f"{info.max_concurrency:.1f} sequences of full length at a time",
        *(["prompts   always computed, no prefix cache: sequences keep states of their own"] if _states(info) else []),
        f"URL       {_url(host, port, settings)}/v1",
        "",
        curl_line(client, host, port, settings),
    ]
    for path in info.fast_paths:
        if path.slow:
            warn(console, path.warning)
    for line in lines:
        # Soft wrap: a line that the terminal broke could not be copied.
        console.print(line, soft_wrap=True, highlight=False)


def _fast_paths(paths: list[FastPath]) -> list[str]:
    """One line a part: how many layers or modules run on what."""
    parts = list(dict.fromkeys(path.part for path in paths))
    lines = [(part, ", ".join(str(path) for path in paths if path.part == part)) for part in parts]
    return [f"{'runs on' if i == 0 else '':<10}{part}: {text}" for i, (part, text) in enumerate(lines)]


def _states(info: EngineInfo) -> bool:
    """Whether it is for what sequences keep that prompts are not found again."""
    return not info.prefix_caching and any(path.part == "per-variant" for path in info.fast_paths)


def _fidelity(variant: VariantInfo) -> str:
    found = variant.fidelity
    return "" if found is None else f"  KL {found.kl:.2g} to its original, same first token {100 * found.top1:.1f} %"


def curl_line(client: AsyncEngineClient, host: str, port: int, settings: ServerSettings) -> str:
    """A first request that this server answers."""
    variant = client.processor.served[0]
    tokenizer = client.processor.tokenizer(variant.name)
    body: dict[str, object] = {"model": variant.name, "max_tokens": min(32, variant.max_model_len // 2)}
    if tokenizer is not None and tokenizer.has_chat_template:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        path = "completions"
        body["prompt"] = "Hello" if tokenizer is not None else [0]
    key = '-H "Authorization: Bearer $POLYMOE_API_KEY" ' if settings.needs_key else ""
    # Names may hold a quote; the shell must not see it.
    data = json.dumps(body).replace("'", "\\u0027")
    return f"curl {_url(host, port, settings)}/v1/{path} -H 'Content-Type: application/json' {key}-d '{data}'"


def _url(host: str, port: int, settings: ServerSettings) -> str:
    """Where a client on this machine connects."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    scheme = "http" if settings.ssl_certfile is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
