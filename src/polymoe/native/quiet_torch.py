"""torch, loaded so that its idle threads sleep and large tensors lie in large pages. Imported before anything that
imports torch by who runs an engine.

After each parallel operation the threads of torch's OpenMP spin for milliseconds, unless the environment forbids it
when they are loaded. The compiled kernels have threads of their own (`csrc/threads.h`), which would have to share the
cores with them. `SLEEPS` is False where torch was there before.

Where Linux gives pages of 2 MiB to who asks (`madvise`), torch asks for tensors of 2 MiB and more if the environment
says so. Packed experts are read from dozens of places at once: with pages of 4 KiB a tenth of a step was looking up
pages.
"""

import os
import sys

_SETTINGS = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}  # GNU's OpenMP, Intel's
_SETTINGS |= {"THP_MEM_ALLOC_ENABLE": "1"}  # large pages

if "torch" not in sys.modules:
    _added = [name for name in _SETTINGS if name not in os.environ]
    os.environ.update({name: _SETTINGS[name] for name in _added})
    import torch

    torch.empty(1)  # the first tensor reads the setting for all
    for _name in _added:  # not for the processes that this one starts
        del os.environ[_name]
    SLEEPS = "GOMP_SPINCOUNT" in _added or os.environ["GOMP_SPINCOUNT"] == "0"
else:
    SLEEPS = os.environ.get("GOMP_SPINCOUNT") == "0"
