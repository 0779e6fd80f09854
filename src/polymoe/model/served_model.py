"""A bundle on a device, ready for mixed-variant passes: stock definition, variant stacks, expert pool, KV cache.

skeleton (stock, no weights)  <-  non-experts as stacks or shared tensors, experts in the pool, cache in attention
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from polymoe.bundle.reader import Bundle
from polymoe.errors import BundleError, ConfigError
from polymoe.model.attention.paged import AttentionLayer, KVCache, PagedAttention
from polymoe.model.backends.base import Backend
from polymoe.model.backends.choose import choose_backend
from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import ForwardBatch, RowMap
from polymoe.model.experts.layer import polymoe_experts_forward
from polymoe.model.experts.pool import ExpertPool
from polymoe.model.fast_paths import fast_paths
from polymoe.model.per_variant.module import install
from polymoe.model.per_variant.sequence_states import SequenceStates
from polymoe.model.stock.fused_attention import fuse_attention
from polymoe.model.stock.fused_decoder_layer import fuse_decoder_layers
from polymoe.model.stock.fused_model import fuse_model
from polymoe.model.stock.fused_norm import fuse_norms
from polymoe.model.stock.fused_router import fuse_routers
from polymoe.model.stock.skeleton import (
    accepts_logits_to_keep,
    expert_modules,
    expert_tensor_names,
    float32_weights,
    retie,
    set_weight,
)
from polymoe.model.stock.stateful import cache_factory
from polymoe.model.stock.stock_model import StockModel
from polymoe.model.transfer.copies import ThreadCopier
from polymoe.model.transfer.staging import Staging
from polymoe.model.transfer.stream_copies import StreamCopier
from polymoe.model.variants.packed_place import by_place, place_packed, reader_of
from polymoe.model.variants.packed_variants import PackedVariants
from polymoe.model.variants.row_group import RowGroup
from polymoe.model.variants.slot_gates import gate_slots
from polymoe.model.variants.slots import Slots, slot_rows
from polymoe.model.variants.variant_stack import VariantStack
from polymoe.native.library import one_torch_thread

Progress = Callable[[str, float], None]

_FEW_TOKENS = 64  # beyond, torch's own operations are worth several threads
_SMALL_SHARE = 0.01  # of the values of a model's linear maps


class ServedModel:
    """Weights of all variants on one device behind one `forward`.

    Args:
        stock: the bundle's, taken over.
        bundle: what to serve.
        device, dtype: where and in what precision everything is held and computed (weights that transformers keeps in
            float32 stay so).
        slots: rows for non-experts; fewer than variants means reconfiguration at run time.
        staging: with fewer slots than variants, one more row for the variant that runs next.
        expert_cache_bytes: device memory for absent experts that were fetched.
        progress: called with (stage, fraction done).
        backend: what computes. None: the best for the device (tests run a GPU's on a CPU).
        max_variants: versions that may be held at once, where they come and go (`LiveWeights`); 0: they stay.
    """

    def __init__(
        self,
        stock: StockModel,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype,
        slots: int,
        expert_cache_bytes: int,
        progress: Progress | None = None,
        staging: bool = True,
        backend: Backend | None = None,
        max_variants: int = 0,
    ) -> None:
        self.bundle, self.device, self.dtype = bundle, device, dtype
        backend = backend or choose_backend(device, dtype)
        self.context = ForwardContext(backend)
        self.attention_layers: dict[int, AttentionLayer] = stock.trial.attention_layers
        self._token_axes = stock.trial.token_axes
        self._per_variant = stock.trial.per_variant
        self.model = stock.skeleton
        self._float32_weights = float32_weights(self.model, self.dtype)
        self._keeps_rows = accepts_logits_to_keep(self.model)
        experts = expert_modules(self.model)
        if [path for path, _ in experts] != list(bundle.expert_modules):
            raise BundleError(
                f"the bundle's experts are at {bundle.expert_modules}, this transformers version's elsewhere"
            )
        report = progress or (lambda _stage, _fraction: None)

        num_variants = len(bundle.variants)
        slots, spare = slot_rows(slots, num_variants, staging)
        copier = StreamCopier(device) if device.type == "cuda" else ThreadCopier()
        self.slots = Slots(slots, spare, RowMap([-1] * num_variants), reader_of(bundle), copier=copier)
        self.max_variants = max_variants
        # Places 0 … V − 1 are those of the planned variants, whether they are still there or not.
        self.occupied = [1] * num_variants + [-1] * max_variants
        self._groups: dict[tuple[int, ...], RowGroup] = {}
        self.plain: list[str] = []  # non-experts that are one tensor for all variants
        self.packed: dict[str, PackedVariants] = {}
        self.places = RowMap([*range(num_variants), *[-1] * max_variants])  # of packed ones that come and go
        self._slot_bytes = 0
        self._shared_bytes = 0  # of packed ones
        if backend.keeps_tables_on_device:
            self.slots.row_map.keep_on(device)
            self.places.keep_on(device)
        self._staging = Staging(device)
        names = bundle.nonexpert_names
        for done, name in enumerate(names):
            report("non-experts", done / len(names))
            self._place(name)
        if self.slots.num_slots < num_variants:
            if backend.keeps_tables_on_device:
                gate_slots(self.model, self.slots)
            self.slots.fill()
        report("non-experts", 1.0)

        report("experts", 0.0)
        transposed = any(module.is_transposed for _, module in experts)
        self.pool = ExpertPool(
            bundle, self.context, device, dtype, expert_cache_bytes, self._staging,
            lambda f: report("experts", f), transposed, max_variants,
        )  # fmt: skip
        self.expert_modules = [module for _, module in experts]
        for layer, (_, module) in zip(self.pool.layers, experts, strict=True):
            for name in expert_tensor_names(module):
                module._parameters[name] = None
            module.polymoe_experts = layer
            layer.prepare(module, backend)
            if hasattr(module, "config"):  # behind transformers' registry: not looked up in every call
                module.forward = partial(polymoe_experts_forward, module)
        text = bundle.config.get_text_config()
        self.pool.map_absent([module for _, module in experts], getattr(text, "num_experts_per_tok", 1))
        retie(self.model, dict(getattr(self.model, "all_tied_weights_keys", {}) or {}))
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if isinstance(buffer, torch.Tensor):
                    module._buffers[name] = buffer.to(device)
        fuse_norms(self.model, backend)
        alone = {part for path in self._per_variant for part in self.model.get_submodule(path).modules()}
        mixed = [module for module in self.model.modules() if module not in alone]
        fuse_routers(mixed, backend)
        fuse_attention(mixed, backend)
        fuse_decoder_layers(mixed, backend)
        self.fused = None if self._per_variant else fuse_model(self.model, backend, fixed=max_variants == 0)
        self.fast_paths = fast_paths(
            self.model, backend, self.pool.layers, self.attention_layers.values(), dtype, self._per_variant
        )
        together = all(spec.together for spec in self._per_variant.values())
        joint = all(spec.joint for spec in self._per_variant.values())
        self.states = SequenceStates(cache_factory(self.model, bundle.config), together, joint)
        self._run_per_variant = install(self.model, self._per_variant, self.states, self.context)
        self._by_kernels = self._products_by_kernels()
        left = [n for n, p in self.model.named_parameters() if p.is_meta]
        if left:
            raise BundleError(f"the bundle has no weights for {', '.join(left)}; plan it again with this version.")

    def _products_by_kernels(self) -> bool:
        """Whether the compiled kernels compute a step's large products, so that torch has small operations left."""
        if not self.context.backend.has_own_threads:
            return False
        if not all(path.is_compiled for path in self.fast_paths if path.part in ("experts", "absent experts")):
            return False
        weights = [m.weight for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        plain = sum(w.numel() for w in weights if not isinstance(w, VariantStack | PackedVariants))
        return plain <= _SMALL_SHARE * sum(w.numel() for w in weights)

    def _weight_dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._float32_weights else self.dtype

    def _group_of(self, sources: Sequence[int]) -> RowGroup:
        """Where every version has a row. sources: per variant, the lowest with the identical tensor."""
        distinct = sorted(set(sources))
        assignment = (*(distinct.index(source) for source in sources), *[-1] * self.max_variants)
        if assignment not in self._groups:
            row_map = RowMap(list(assignment))
            if self.context.backend.keeps_tables_on_device:
                row_map.keep_on(self.device)
            self._groups[assignment] = RowGroup(row_map)
        return self._groups[assignment]

    def _place(self, name: str) -> None:
        """Put a non-expert where the stock model looks for it: one tensor if all variants share it, else a stack."""
        meta = self.model.state_dict(keep_vars=True).get(name)
        if meta is None:
            raise BundleError(
                f"{self.bundle.path}: the model has no place for {name}; plan it again with this version."
            )
        sources = self.bundle.nonexpert_sources(name)
        distinct = sorted(set(sources))
        packed = self.bundle.packed_nonexpert(name)
        shape = torch.Size(packed.shape) if packed else self.bundle.nonexpert(distinct[0], name).shape
        lengths = (*meta.shape[:1], self.bundle.variants[distinct[0]].vocab_size)  # embeddings may have fewer
        if len(shape) != meta.ndim or shape[1:] != meta.shape[1:] or (shape and shape[0] not in lengths):
            raise BundleError(
                f"{self.bundle.path}: {name} has shape {list(shape)}, config.json asks for {list(meta.shape)}; plan it "
                "again or copy it again."
            )
        dtype = self._weight_dtype(name)
        if packed:
            self._place_packed(name, sources, dtype)
            return
        if len(distinct) == 1:
            value = torch.empty(meta.shape, device=self.device, dtype=dtype)
            self._staging.copy(value, self.bundle.nonexpert(distinct[0], name))
            self.plain.append(name)
            set_weight(self.model, name, value)
            return
        in_slots = len(distinct) > self.slots.num_rows
        num_rows = self.slots.num_rows if in_slots else max(len(distinct), self.max_variants)
        rows = torch.empty(num_rows, *meta.shape, device=self.device, dtype=dtype)
        if in_slots:
            self._slot_bytes += rows.numel() * rows.element_size()
            self.slots.stacks[name] = rows
            row_map = self.slots.row_map
        else:
            for row, source in enumerate(distinct):
                self._staging.copy(rows[row], self.bundle.nonexpert(source, name))
            group = self._group_of(sources)
            group.stacks[name] = rows
            row_map = group.row_map
        set_weight(self.model, name, VariantStack(rows, row_map, self.context, self._token_axes.get(name)))

    def _place_packed(self, name: str, sources: Sequence[int], dtype: torch.dtype) -> None:
        placed = place_packed(self.bundle, name, self.slots, self._staging, self.device)
        self._shared_bytes += placed.shared_bytes
        rows, module = placed.rows, self.model.get_submodule(name.rpartition(".")[0])
        if self.max_variants:
            rows, row_map = by_place(rows, sources, self.max_variants), self.places
        else:
            row_map = self.slots.row_map if placed.in_slots else self._group_of(sources).row_map
        if dtype == torch.bfloat16 and not isinstance(module, torch.nn.Embedding):
            rows = self.context.backend.laid_out_rows(rows, whole=not placed.in_slots)
        self.packed[name] = PackedVariants(rows, row_map, self.context, dtype)
        set_weight(self.model, name, self.packed[name])

    @property
    def some_variant(self) -> int:
        """One whose weights are on the device."""
        return min(self.slots.loaded, default=self.occupied.index(1))

    @property
    def groups(self) -> list[RowGroup]:
        """The stacks that are not managed by slots, by who shares rows with whom."""
        return list(self._groups.values())

    def weight(self, name: str) -> torch.Tensor:
        """A non-expert as the stock model has it."""
        path, _, leaf = name.rpartition(".")
        found: torch.Tensor = getattr(self.model.get_submodule(path), leaf)
        return found

    def promote(self, group: RowGroup) -> None:
        """What was one tensor for all variants becomes stacks, whose first row it is."""
        if self.context.backend.keeps_tables_on_device:
            group.row_map.keep_on(self.device)
        for name, rows in group.stacks.items():
            self.plain.remove(name)
            stack = VariantStack(rows, group.row_map, self.context, self._token_axes.get(name))
            set_weight(self.model, name, stack)
        self._groups[-1 - len(self._groups),] = group
        retie(self.model, dict(getattr(self.model, "all_tied_weights_keys", {}) or {}))
        for module in self._run_per_variant:
            module.renew()

    def attach_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """Allocate the paged cache and hand it to every attention module."""
        try:
            # One block more where steps are padded: what no sequence owns.
            null_blocks = int(self.context.backend.pads_steps)
            self.kv_cache = KVCache(self.attention_layers, num_blocks, block_size, self.device, self.dtype, null_blocks)
        except RuntimeError as error:  # the allocator's own error names no option
            raise ConfigError(f"no memory for {num_blocks} KV blocks; give a smaller --kv-cache. ({error})") from error
        attention = PagedAttention(self.context, self.kv_cache)
        for module in self.model.modules():
            module.polymoe_attention = attention
        return self.kv_cache

    @property
    def runs_per_variant(self) -> bool:
        """Whether some modules run once for each variant of a step."""
        return bool(self._per_variant)

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes held on the device, by kind; `expert_cache`: what it holds now; `host_pinned`: on the host."""
        mapped = self.pool.mapped
        packed = sum(weight.packed.num_bytes for weight in self.packed.values())
        return {
            **self.pool.resident_bytes,
            "nonexperts_shared": self._shared_bytes
            + sum(w.numel() * w.element_size() for w in map(self.weight, self.plain)),
            "nonexperts_own": packed
            - self._shared_bytes
            + self._slot_bytes
            + sum(group.num_bytes for group in self.groups),
            "expert_cache": self.pool.cache.used + (mapped.row_bytes if mapped else 0),
            **({"host_pinned": mapped.host_bytes} if mapped else {}),
            "kv_cache": self.kv_cache.nbytes,
            **({"states": self.states.nbytes} if self._per_variant else {}),
        }

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: ForwardBatch,
        sampled_rows: torch.Tensor,
        upcoming: Sequence[int] = (),
    ) -> torch.Tensor:
        """One pass over a flattened batch.

        Args:
            input_ids, positions: `[T]` int64.
            sampled_rows: `[R]` int64, the rows whose logits are wanted, ascending.
            upcoming: variants that wait for a slot; the first is copied to the staging row beside the computation.

        Returns: logits `[R, vocabulary of the largest variant]`, in the model's dtype.
        """
        self.admit(batch.present)
        if self.device.type == "cpu":
            self.prefetch(upcoming)
            return self.compute(input_ids, positions, batch, sampled_rows)
        logits = self.compute(input_ids, positions, batch, sampled_rows)
        self.prefetch(upcoming)  # the device is busy by now
        return logits

    def admit(self, present: set[int]) -> None:
        """Bring the variants of a step into slots, where there are fewer slots than variants."""
        if self.slots.num_slots < len(self.bundle.variants):
            self.slots.ensure(present)

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Start to copy the first variant that waits for a slot to the staging row."""
        if upcoming and self.slots.num_slots < len(self.bundle.variants):
            self.slots.prefetch(upcoming[0])

    def compute(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: ForwardBatch,
        sampled_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The pass itself, arguments as `forward`; `sampled_rows` None: the logits of every row are wanted.

        Where the backend keeps its tables on the device nothing here waits for the device, unless experts are absent.
        """
        assert input_ids.shape == positions.shape == (batch.tokens.num_tokens,)
        assert sampled_rows is None or sampled_rows.shape == (batch.sampled.num_tokens,)
        self.context.set(batch)
        if self._per_variant:
            self.states.begin(batch)
        logits = None
        if self.fused is not None and sampled_rows is not None:
            logits = self.fused(input_ids, positions, sampled_rows, batch)
        if logits is None:
            with one_torch_thread() if self._by_kernels and len(input_ids) <= _FEW_TOKENS else nullcontext():
                logits = self._stock_logits(input_ids, positions, sampled_rows)
        self.context.set(None)
        self.states.end()
        return logits

    def _stock_logits(
        self, input_ids: torch.Tensor, positions: torch.Tensor, sampled_rows: torch.Tensor | None
    ) -> torch.Tensor:
        options = {} if sampled_rows is None or not self._keeps_rows else {"logits_to_keep": sampled_rows}
        output = self.model(input_ids=input_ids[None], position_ids=positions[None], use_cache=False, **options)
        logits: torch.Tensor = output.logits[0]
        return logits if sampled_rows is None or self._keeps_rows else logits[sampled_rows]
