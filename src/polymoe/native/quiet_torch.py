"""torch, loaded so that its idle threads sleep. Imported before anything that imports torch by who runs an engine.

After each parallel operation the threads of torch's OpenMP spin for milliseconds, unless the environment forbids it
when they are loaded. The compiled kernels have threads of their own (`csrc/threads.h`), which would have to share the
cores with them. `SLEEPS` is False where torch was there before.
"""

import os
import sys

_SETTINGS = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}  # GNU's OpenMP, Intel's

if "torch" not in sys.modules:
    _added = [name for name in _SETTINGS if name not in os.environ]
    os.environ.update({name: _SETTINGS[name] for name in _added})
    import torch  # noqa: F401

    for _name in _added:  # not for the processes that this one starts
        del os.environ[_name]
    SLEEPS = "GOMP_SPINCOUNT" in _added or os.environ["GOMP_SPINCOUNT"] == "0"
else:
    SLEEPS = os.environ.get("GOMP_SPINCOUNT") == "0"
