"""What a starting server tells its operator."""

import json

from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.engine.client import AsyncEngineClient
from polymoe.engine.info import VariantInfo


def print_summary(console: Console, client: AsyncEngineClient, host: str, port: int, api_key: bool) -> None:
    """Variants, what is resident, what fits, where to connect, and a curl line that works."""
    info = client.info
    width = max(len(variant.name) for variant in info.variants)
    lines = [f"{len(info.variants)} variants, policy {info.policy}, {info.dtype} on {info.device}"]
    lines += [
        f"  {variant.name:<{width}}  version {variant.version[:12]}  {variant.max_model_len} tokens of context"
        f"{_fidelity(variant)}"
        for variant in info.variants
    ]
    sizes = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in info.resident_bytes.items())
    lines += [
        f"experts   {info.experts_resident} resident, {info.experts_absent} absent",
        f"slots     {info.slots} for {len(info.variants)} variants",
        f"memory    {sizes}",
        f"KV cache  {info.num_kv_blocks * info.block_size} tokens, "
        f"{info.max_concurrency:.1f} sequences of full length at a time",
        f"URL       {_url(host, port)}/v1",
        "",
        curl_line(client, host, port, api_key),
    ]
    for line in lines:
        # Soft wrap: a line that the terminal broke could not be copied.
        console.print(line, soft_wrap=True, highlight=False)


def _fidelity(variant: VariantInfo) -> str:
    found = variant.fidelity
    return "" if found is None else f"  KL {found.kl:.2g} to its original, same first token {100 * found.top1:.1f} %"


def curl_line(client: AsyncEngineClient, host: str, port: int, api_key: bool) -> str:
    """A first request that this server answers."""
    variant = client.info.variants[0]
    tokenizer = client.processor.tokenizer(variant.name)
    body: dict[str, object] = {"model": variant.name, "max_tokens": min(32, variant.max_model_len // 2)}
    if tokenizer is not None and tokenizer.has_chat_template:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        path = "completions"
        body["prompt"] = "Hello" if tokenizer is not None else [0]
    key = '-H "Authorization: Bearer $POLYMOE_API_KEY" ' if api_key else ""
    # Names may hold a quote; the shell must not see it.
    data = json.dumps(body).replace("'", "\\u0027")
    return f"curl {_url(host, port)}/v1/{path} -H 'Content-Type: application/json' {key}-d '{data}'"


def _url(host: str, port: int) -> str:
    """Where a client on this machine connects."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
