"""The memory of a process that serves, as the system counts it, is what the manifest promises.

All of it: the pages of the bundle's mapped files are let go once their tensors are copied, so that not even the most
that it ever held is more than a layer beyond that.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_family
from polymoe.offline.api import make_plan
from polymoe.offline.plan.options import PlanOptions
from zygote import run_python

SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 3, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
}  # fmt: skip
KV_BYTES = 4 << 20  # its pages are taken when they are first written
# More: the stock model's skeleton, kernels' buffers and helpers, a step's tensors. Less: what the small model left.
CONSTANT = 12 << 20
SERVE = """
import gc, json, sys
from polymoe import LLM, SamplingParams

def rss():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {kind: int(lines[kind].split()[0]) << 10 for kind in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}

small, large, kv = sys.argv[1:]
with LLM(small, kv_cache_bytes=1 << 20, device="cpu", num_threads=1) as llm:  # what is loaded once is loaded now
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4), variants=["base"])
gc.collect()
before = rss()
llm = LLM(large, kv_cache_bytes=int(kv), device="cpu", num_threads=1)
loaded = rss()
llm.generate([[5, 6, 7]] * 2, SamplingParams(max_tokens=4, ignore_eos=True), variants=["base", "v1"])
print(json.dumps({"before": before, "loaded": loaded, "after": rss(), "model": llm.engine.model.resident_bytes}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_family("mixtral", tmp_path_factory.mktemp("large"), 2, dtype=torch.bfloat16, **SIZES)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    return make_plan(
        make_family("mixtral", root, 2, dtype=torch.bfloat16, head_dim=32, hidden_size=64, intermediate_size=64),
        "separate", None, root / "bundle",
    ).path  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
@pytest.mark.parametrize(("policy", "options"), [("separate", {}), ("delta", {"base": "int4", "delta_bits": 2})])
def test_a_process_holds_what_the_manifest_promises(
    policy: str, options: dict[str, Any], checkpoints: dict[str, Path], small: Path, tmp_path: Path
) -> None:
    bundle = make_plan(checkpoints, policy, None, tmp_path / "bundle", options=PlanOptions(**options))
    promised = bundle.resident_bytes.total
    assert (promised > 250 << 20) == (policy == "separate")
    done = run_python(SERVE, str(small), str(bundle.path), str(KV_BYTES))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    held = found["after"]["VmRSS"] - found["before"]["VmRSS"]
    print(f"{policy}: {held / 2**20:.1f} MiB held, {promised / 2**20:.1f} MiB promised, {found}")
    assert 0.98 * promised - CONSTANT <= held <= 1.02 * promised + KV_BYTES + CONSTANT, (held, promised, found)
    layer = sum(record.size for record in bundle.manifest.files) / 3
    assert found["after"]["VmHWM"] - found["before"]["VmHWM"] <= held + layer + CONSTANT, (layer, found)
