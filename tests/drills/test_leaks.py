"""Nothing of one variant or tenant shows in an answer of another."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from drills.load import Answer, say, stream
from families import make_family
from polymoe import LLM, SamplingParams
from polymoe.offline.api import make_plan
from polymoe.server.keys import Key, add_key
from process_server import ProcessServer
from servers import CONTEXT, wait_for

pytestmark = pytest.mark.drill
TOKENS, ROUNDS = 24, 6
PROMPTS = [[5 + (k * j) % 40 for j in range(1, 60 + k)] for k in range(8)]  # several blocks, the first of them alike


def alone(path: Path, folder: Path) -> list[str]:
    """What a variant says that is served by itself."""
    make_plan({path.name: path}, "separate", None, folder)
    with LLM(str(folder), device="cpu", num_threads=1, kv_cache_bytes=1 << 24) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        outputs = llm.generate(PROMPTS, sampling, path.name, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]


def test_every_answer_is_that_of_its_variant_alone(tmp_path: Path) -> None:
    """The same prompts of three tenants to three variants that share one slot, a prefix cache, and a KV cache that is
    too small for all of them."""
    paths = make_family("mixtral", tmp_path / "checkpoints", tokenizer=True, max_position_embeddings=CONTEXT)
    wanted = {name: alone(path, tmp_path / name) for name, path in paths.items()}
    assert len({tuple(texts) for texts in wanted.values()}) == len(wanted), "variants that say the same prove nothing"
    make_plan(paths, "separate", None, tmp_path / "bundle")
    keys = [add_key(tmp_path / "keys.json", Key(name=f"tenant{k}", sha256="0" * 64)) for k in range(3)]
    env = {**os.environ, "POLYMOE_KEYS": str(tmp_path / "keys.json")}
    flags = ("--slots", "1", "--max-num-seqs", "24", "--open-metrics")
    with ProcessServer(tmp_path / "bundle", tmp_path, 5.0, *flags, kv_cache="1MB", env=env) as server:
        server.wait_until_ready()
        asked = [(name, k, key) for name in paths for k in range(len(PROMPTS)) for key in keys] * ROUNDS
        random.Random(0).shuffle(asked)

        async def ask() -> list[Answer]:
            room = asyncio.Semaphore(48)

            async def one(name: str, k: int, key: str) -> Answer:
                body: dict[str, Any] = {"model": name, "prompt": PROMPTS[k], "max_tokens": TOKENS}
                async with room:
                    return await stream(server.port, {**body, "temperature": 0, "ignore_eos": True}, key=key)

            return await asyncio.gather(*(one(*given) for given in asked))

        answers = asyncio.run(ask())
        pairs = zip(asked, answers, strict=True)
        different = [(name, k) for (name, k, _), answer in pairs if answer.text != wanted[name][k]]
        hits, loads = server.metric("prefix_cache_hits_total"), server.metric("reconfigurations_total", "polymoe")
        preemptions = server.metric("num_preemptions_total")
        wait_for(lambda: server.metric("num_requests_running") == 0)
    say("answers over variants and tenants", requests=len(asked), different=len(different), reconfigurations=loads,
        tokens_from_the_prefix_cache=hits, preemptions=preemptions)  # fmt: skip
    assert not different
    assert hits > 0
    assert loads > 3
