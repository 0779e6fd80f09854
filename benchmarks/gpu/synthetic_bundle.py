"""A bundle without a folder: the layout of a real one, its tensors made at random when they are asked for.

Speed does not depend on the values of weights but for one thing: random routers spread tokens near uniformly.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from polymoe.bundle.manifest import FORMAT_VERSION, Manifest, VariantRecord, WeightBytes
from polymoe.bundle.reader import Bundle, PackedTensors
from polymoe.model.stock.skeleton import build_skeleton, expert_modules, expert_tensor_names
from polymoe.quant.formats import GRID_LEVELS, Format, get_format, num_bytes, parts
from shapes import make_config


@dataclass(frozen=True)
class Layout:
    """Which bundle.

    base: format of the bases, which all variants share. delta: format of each variant's deltas; "" for none.
    resident: bases on the device over all layers; None: all. The others are in the host tier.
    layers: only the first ones.
    host: weights come from pinned host memory, as those of a real bundle do; else they are made on the device.
    """

    shape: str
    variants: int
    base: str = "stored"
    delta: str = ""
    resident: int | None = None
    host: bool = False
    device: str = "cuda"
    dtype: str = "bfloat16"
    layers: int | None = None  # None: all
    first: int = 0  # the variants are v{first}, v{first + 1}, …

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "Layout":
        return cls(**json.loads(text))


class SyntheticBundle(Bundle):
    """See the module docstring."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.device, self.dtype = torch.device(layout.device), getattr(torch, layout.dtype)
        self._config = make_config(layout.shape, layout.layers)
        model = build_skeleton(self._config)
        experts = expert_modules(model)
        names = {f"{path}.{leaf}" for path, module in experts for leaf in expert_tensor_names(module)}
        tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
        self.nonexpert_shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in names | set(tied)}
        tensors = {name: tuple(experts[0][1]._parameters[name].shape) for name in expert_tensor_names(experts[0][1])}
        self.num_experts = next(iter(tensors.values()))[0]
        self.expert_shapes = {name: shape[1:] for name, shape in tensors.items()}
        self.num_layers = len(experts)
        self._resident = self._residents()
        self.path, self.faults = Path(__file__).parent, {}
        self.manifest = self._manifest(type(model).__name__, [path for path, _ in experts], tied)
        self.table, self.delta, self.sign = self._tables()

    def _residents(self) -> list[int]:
        """Bases on the device, a layer each: the others are spread evenly over the layers."""
        total = self.num_layers * self.num_experts
        wanted = total if self.layout.resident is None else min(self.layout.resident, total)
        return [wanted // self.num_layers + (i < wanted % self.num_layers) for i in range(self.num_layers)]

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        count, experts = self.layout.variants, self.num_experts
        rows = []
        for resident in self._resident:
            ids = torch.arange(experts)
            rows.append(torch.where(ids < resident, ids, -1 - (ids - resident)))
        table = torch.stack(rows).expand(count, -1, -1).to(torch.int32).contiguous()
        if not self.layout.delta:
            return table, None, None
        owners = torch.arange(count)[:, None] * experts + torch.arange(experts)
        delta = owners[:, None].expand(count, self.num_layers, experts).to(torch.int32).contiguous()
        return table, torch.where(table >= 0, delta, -1), torch.ones_like(table, dtype=torch.int8)

    @cached_property
    def base_bytes(self) -> int:
        """One physical base."""
        return self._expert_bytes(get_format(self.layout.base))

    @cached_property
    def delta_bytes(self) -> int:
        """One delta; 0 without."""
        return self._expert_bytes(get_format(self.layout.delta)) if self.layout.delta else 0

    def _expert_bytes(self, fmt: Format) -> int:
        return sum(num_bytes(fmt, shape, self.dtype) for shape in self.expert_shapes.values())

    @cached_property
    def nonexpert_bytes(self) -> int:
        """One variant's."""
        return sum(math.prod(shape) for shape in self.nonexpert_shapes.values()) * int(self.dtype.itemsize)

    @cached_property
    def embedding_bytes(self) -> int:
        """Of the input embeddings, of which a step reads only a few rows."""
        return math.prod(self.nonexpert_shapes["model.embed_tokens.weight"]) * int(self.dtype.itemsize)

    def _manifest(self, architecture: str, modules: list[str], tied: dict[str, str]) -> Manifest:
        count = self.layout.variants
        parameters = sum(math.prod(shape) for shape in self.expert_shapes.values())
        deltas = count * self.num_experts if self.layout.delta else 0
        records = [
            VariantRecord(
                name=f"v{self.layout.first + i}", version=str(i), source="", source_path="", source_hash="",
                max_model_len=self._config.max_position_embeddings, vocab_size=self._config.vocab_size,
                dtype=self.layout.dtype, has_tokenizer=False,
            )
            for i in range(count)
        ]  # fmt: skip
        base_bytes, delta_bytes = sum(self._resident) * self.base_bytes, self.num_layers * deltas * self.delta_bytes
        own = count > 1
        return Manifest(
            format_version=FORMAT_VERSION,
            polymoe_version="",
            transformers_version="",
            policy="synthetic",
            memory="",
            model_type=self._config.model_type,
            architecture=architecture,
            variants=records,
            expert_modules=modules,
            num_experts=self.num_experts,
            expert_shapes={name: list(shape) for name, shape in self.expert_shapes.items()},
            expert_bytes=parameters * self.dtype.itemsize,
            expert_parameters=parameters,
            nonexperts={name: list(range(count)) for name in self.nonexpert_shapes},
            tied=tied,
            transposed=False,
            base_pools=[{self.layout.base: count} for count in self._resident],
            delta_pools=[{self.layout.delta: deltas} if deltas else {} for _ in range(self.num_layers)],
            host_experts=[self.num_experts - count for count in self._resident],
            positions={},
            resident_bytes=WeightBytes(
                resident_experts=base_bytes,
                deltas=delta_bytes,
                nonexperts_shared=0 if own else self.nonexpert_bytes,
                nonexperts_own=count * self.nonexpert_bytes if own else 0,
                tables=count * self.num_layers * self.num_experts * (9 if deltas else 4),
            ),
            host_bytes=0,
            bytes_per_expert_parameter=0.0,
            files=[],
        )

    # --- what a real bundle reads from its folder

    @cached_property
    def config(self) -> Any:
        return self._config

    def variant_config(self, variant: int) -> Any:  # noqa: ARG002
        return self._config

    def variant_folder(self, variant: int) -> Path:  # noqa: ARG002
        return self.path

    def tokenizer_dir(self, variant: int) -> Path | None:  # noqa: ARG002
        return None

    def nonexpert(self, variant: int, name: str) -> torch.Tensor:  # noqa: ARG002
        shape = self.nonexpert_shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype)
        return self._normal(shape, shape[-1] ** -0.5)

    def resident_experts(self, layer: int) -> dict[str, torch.Tensor]:
        count = self._resident[layer] if self.layout.base == "stored" else 0
        return {name: self._normal((count, *shape), shape[-1] ** -0.5) for name, shape in self.expert_shapes.items()}

    @property
    def levels(self) -> str:
        return GRID_LEVELS

    def packed_bases(self, layer: int) -> dict[str, PackedTensors]:
        if self.layout.base == "stored":
            return {}
        return {self.layout.base: self._random(get_format(self.layout.base), self._resident[layer], 1.0)}

    def packed_deltas(self, layer: int) -> dict[str, PackedTensors]:  # noqa: ARG002
        if not self.layout.delta:
            return {}
        count = self.layout.variants * self.num_experts
        return {self.layout.delta: self._random(get_format(self.layout.delta), count, 0.1)}

    def host_expert(self, layer: int, index: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """The same tensors for every expert: a host need not hold them all to be read at the speed of its bus."""
        return {name: self._host(shape, shape[-1] ** -0.5) for name, shape in self.expert_shapes.items()}

    def _random(self, fmt: Format, count: int, size: float) -> PackedTensors:
        found: PackedTensors = {}
        for name, shape in self.expert_shapes.items():
            found[name] = {}
            for part, (dtype, stored) in parts(fmt, (count, *shape), self.dtype).items():
                if dtype == torch.uint8:
                    found[name][part] = self._bytes(stored)
                else:
                    found[name][part] = torch.full(stored, size * shape[-1] ** -0.5, dtype=dtype, device=self._made_on)
        return found

    @property
    def _made_on(self) -> torch.device:
        return torch.device("cpu") if self.layout.host else self.device

    def _bytes(self, shape: tuple[int, ...]) -> torch.Tensor:
        if not self.layout.host:
            return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        # Read from one pinned buffer: what counts is that the bytes cross the bus.
        size = math.prod(shape)
        return self._host_bytes(size)[:size].view(shape)

    def _normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        if self.layout.host and shape[0]:
            return self._host(shape, std)
        return torch.empty(shape, dtype=self.dtype, device=self._made_on).normal_(std=std)

    @cache  # noqa: B019  (a bundle lives as long as its process)
    def _host(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        made = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=std)
        return self._pinned(made)

    @cache  # noqa: B019
    def _host_bytes(self, size: int) -> torch.Tensor:
        return self._pinned(torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.device))

    def _pinned(self, made: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return made
        host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        host.copy_(made)
        return host
