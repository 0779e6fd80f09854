"""polymoe's engine process on a synthetic bundle: `python -m engine_process --fd N`, started by the usual client.

The config's `bundle` is a JSON object: `layout`, and `parts`: into how many equal parts the device is cut.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.engine.process import main
from polymoe.model.backends.cuda import CudaBackend
from polymoe.model.backends.device_facts import read_device_facts
from synthetic_bundle import Layout, SyntheticBundle


def make_core(config: EngineConfig, progress: Callable[[str, float], None]) -> EngineCore:
    described = json.loads(config.bundle)
    layout = Layout(**described["layout"])
    if layout.device == "cpu":
        # The script's own trial. The kernels' references, since the interpreter would take minutes.
        return EngineCore(config, progress, bundle=SyntheticBundle(layout), backend=CudaBackend(reference=True))
    facts = read_device_facts(torch.device(layout.device))
    if described["parts"] > 1:
        share = facts.total_bytes // described["parts"]
        torch.cuda.set_per_process_memory_fraction(1 / described["parts"])
        # Of its part a process has all but its own context.
        facts = replace(facts, total_bytes=share, free_bytes=min(share - (600 << 20), facts.free_bytes))
    return EngineCore(config, progress, bundle=SyntheticBundle(layout), facts=facts)


if __name__ == "__main__":
    sys.exit(main(make_core))
