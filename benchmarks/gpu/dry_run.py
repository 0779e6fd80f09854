"""The model parts at real shapes on a GPU that holds nothing: torch's fake tensors, and launches that never run.

    python benchmarks/gpu/dry_run.py PART [--layers N] [--compile]         PART as in model_parts.py

What would fail on a GPU for its arguments fails here: a tensor on the wrong device, a host that waits inside a capture,
a grid or (with `--compile`) a kernel beyond what an H100 has. Values, and so times, mean nothing; prompts that meet
absent experts cannot be run, since which they need is a value. Needs a CUDA build of torch, no GPU and a C compiler
(for a driver that says yes).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20,
    total_memory=81_100 << 20,
)  # fmt: skip
_SHARED_BYTES = 227 << 10
_CONTEXT_BYTES = 600 << 20
_STUB = """
int cuInit(unsigned f) { return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *active) { *f = 0; *active = 1; return 0; }
int cudaGetDevice(int *d) { *d = 0; return 0; }
int cudaSetDevice(int d) { return 0; }
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
"""


class NoGpu(TorchFunctionMode):
    """What is made on the GPU is a fake tensor; pinned memory is plain memory that is known by its address.

    waits: where the host asked for a value -> how often; within a capture that is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = fake.FakeTensorMode(allow_non_fake_inputs=True)
        self.pinned: set[int] = set()
        self.waits: Counter[str] = Counter()
        self.capturing = False
        self._values: dict[Any, Callable[[torch.Tensor], Any]] = {
            torch.Tensor.__bool__: lambda _: True,
            torch.Tensor.__int__: lambda _: 0,
            torch.Tensor.__float__: lambda _: 0.0,
            torch.Tensor.item: lambda _: 0,
            torch.Tensor.tolist: lambda t: torch.zeros(t.shape, dtype=torch.int64).tolist(),
        }

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self.pinned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {}), **({"generator": None} if "generator" in (kwargs or {}) else {})}
        pins = kwargs.pop("pin_memory", False) or func is torch.Tensor.pin_memory
        if func is torch.Tensor.is_pinned:
            return self.is_pinned(args[0])
        devices = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.device)]
        devices += [torch.device(kwargs["device"])] if isinstance(kwargs.get("device"), str) else []
        to_gpu = any(device.type == "cuda" for device in devices)
        is_fake = any(isinstance(leaf, fake.FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if is_fake and func in self._values:
            return self._wait(func, args[0])
        if to_gpu and not is_fake and func in (torch.tensor, torch.Tensor.to):
            own = torch.tensor(args[0]) if func is torch.tensor else args[0]
            dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), own.dtype)
            with self.mode:
                return torch.empty(own.shape, dtype=dtype, device="cuda")
        with self.mode if to_gpu or is_fake else contextlib.nullcontext():
            out = args[0].clone() if func is torch.Tensor.pin_memory else func(*args, **kwargs)
        if pins:
            self.pinned.add(out.untyped_storage().data_ptr())
        return out

    def _wait(self, func: Any, tensor: torch.Tensor) -> Any:
        assert not self.capturing, f"{func} waits for the device in a capture"
        frames = [f for f in traceback.extract_stack() if "/polymoe/" in f.filename or "/transformers/" in f.filename]
        self.waits[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"] += 1
        return self._values[func](tensor)


class _Event(mock.MagicMock):
    def elapsed_time(self, _other: object) -> float:
        return 1.0


def _patch_torch(gpu: NoGpu) -> None:
    """`torch.cuda` as far as the engine asks."""

    @contextlib.contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        gpu.capturing = True
        yield
        gpu.capturing = False

    class Generator(torch.Generator):
        def __new__(cls, _device: object = None) -> "Generator":
            return super().__new__(cls)

    total = _H100.total_memory
    values = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": _H100.name,
        "mem_get_info": (total - _CONTEXT_BYTES, total), "get_device_properties": _H100, "set_device": None,
        "synchronize": None, "empty_cache": None, "graph_pool_handle": None, "get_sync_debug_mode": 0,
        "set_sync_debug_mode": None, "stream": contextlib.nullcontext(),
    }  # fmt: skip
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("Stream", "CUDAGraph", "current_stream"):
        setattr(torch.cuda, name, mock.MagicMock())
    mock.patch.object(torch.cuda, "Event", _Event).start()
    mock.patch.object(torch.cuda, "graph", graph).start()
    mock.patch.object(torch.cuda, "is_current_stream_capturing", side_effect=lambda: gpu.capturing).start()
    mock.patch.object(torch, "Generator", Generator).start()
    mock.patch.object(fake, "init_gpu_context", return_value=None).start()


class Launches:
    """Stands for Triton's launches: arguments and grids are checked, kernels compiled or counted."""

    def __init__(self, gpu: NoGpu, compiles: bool) -> None:
        self.count = 0
        self.kernels: Counter[str] = Counter()
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        target = GPUTarget("cuda", 90, 32)
        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0
            )
        )
        run, compile_it = JITFunction.run, JITFunction._do_compile

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:  # noqa: ARG001
            for i, given in enumerate(args):
                here = not isinstance(given, torch.Tensor) or given.device.type == "cuda" or gpu.is_pinned(given)
                assert here, f"{kernel.__name__}: argument {i} is in pageable memory of the host"
            assert 0 < grid[0] < 2**31, (kernel.__name__, grid)
            assert all(0 < size < 2**16 for size in grid[1:]), (kernel.__name__, grid)
            self.count += 1
            run(kernel, *args, grid=grid, warmup=True, **options)

        def once(kernel: Any, key: str, signature: Any, device: int, *more: Any) -> Any:
            self.kernels[f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"] += 1
            if compiles:
                made = compile_it(kernel, key, signature, device, *more)
                assert made.metadata.shared <= _SHARED_BYTES, (kernel.__name__, made.metadata.shared)
                return made
            kernel.device_caches[device][0][key] = "known"
            return None

        JITFunction.run, JITFunction._do_compile = launch, once


def _patch_polymoe() -> None:
    """What reads values of the device that matter to nobody here."""
    from polymoe.kernels.gpu import autotune
    from polymoe.model.experts.pool import ExpertPool
    from polymoe.model.transfer.download import Download

    def zeros(download: Any) -> list[torch.Tensor]:
        return [torch.zeros(t.shape, dtype=t.dtype) for t in download._tensors]

    def timed(launch: Callable[[Any], None], candidate: Any) -> float:
        launch(candidate)
        return 1.0

    mock.patch.object(Download, "wait", zeros).start()
    mock.patch.object(ExpertPool, "check_integrity", return_value=None).start()
    mock.patch.multiple(autotune, _time=timed, _save=lambda _device, _known: None).start()


def _with_stub() -> int:
    """Run this program again with a driver that says yes."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stub.c", Path(folder) / "libcuda.so.1"
        source.write_text(_STUB)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        paths = [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": folder, "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--layers", type=int, help="only so many of the model's")
    parser.add_argument("--compile", action="store_true", help="for compute capability 9.0; minutes")
    arguments = parser.parse_args()
    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} is built without CUDA; a dry run needs one that is, and no GPU.")
    if "LD_PRELOAD" not in os.environ:
        return _with_stub()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    gpu = NoGpu()
    _patch_torch(gpu)
    launches = Launches(gpu, arguments.compile)
    _patch_polymoe()
    import model_parts
    from measure import Limits

    mock.patch.object(model_parts, "measure_limits", return_value=Limits(3e12, 5.5e10, 8e14)).start()
    setting = model_parts.Setting("cuda", "real")
    if arguments.layers:
        mock.patch.object(setting, "layout", partial(setting.layout, layers=arguments.layers)).start()
    with gpu:
        figures = model_parts.PARTS[arguments.part](setting)
    kept = {name: figures[name] for name in ("experts_absent", "resident_bytes", "kv_tokens", "graphs")}
    print(json.dumps({**kept, "launches": launches.count, "kernels": launches.kernels, "waits": gpu.waits}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
