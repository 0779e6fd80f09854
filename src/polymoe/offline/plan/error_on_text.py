"""What `polymoe.offline.plan.quantisation_error` predicts from, measured on text in one pass of all variants.

Some windows of each variant's text run along in L + 1 copies: in copy l the experts of layer l alone are disturbed, the
last copy is clean; between them, where non-experts are planned too, are copies for these (`nonexpert_probes.py`). KL
between their logits, over the error put into the layer's output, turns the errors of outputs into nats: κ of a layer
and variant.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polymoe.bundle.atomic import whole_file
from polymoe.console import Console
from polymoe.model.stock.kind import kind_of
from polymoe.offline.calibrate.calibrate import (
    Calibration,
    down_projection,
    first_projection,
    second_moments,
    weighted_sum,
)
from polymoe.offline.calibrate.family_run import FamilyRun, Routed
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.matrices import as_matrix, is_transposed, mlp_order
from polymoe.offline.plan.merge import regmean, weighted_mean
from polymoe.offline.plan.nonexpert_probes import Copies, NonexpertProbes
from polymoe.offline.plan.quantisation_error import (
    TOP1_PER_ROOT_KL,
    ErrorTable,
    FloatArray,
    Partition,
    QuantisationErrors,
    partitions_of,
)
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.progress import step_progress
from polymoe.quant.codec import inverse_factor

FEW_TOKENS = 32  # an expert with fewer is packed without error feedback
_PROBES = 4  # windows that run along in copies
_PROBE_PAIRS = 32  # or pairs, whose targets are shorter
_NOISE = 0.05  # of a matrix's spread
_GAIN_ROWS = 256
_LOGITS = 1 << 28  # most logits in memory, a variant
# Layers are disturbed one by one, on the text that everything is fitted to. KL on other text with all layers packed
# was measured 3 to 6 times higher (docs/quality.md). It changes no plan but how a target (`--min-top1`) is met.
_OTHER_TEXT = 4.5

Matrices = dict[str, Tensor]  # tensor -> float32 [out, in] or [out], of one expert


def errors_on_text(
    family: Family,
    scan: FamilyScan,
    calibration: Calibration,
    console: Console | None = None,
    of_all: bool = False,
) -> QuantisationErrors:
    """Measure on `calibration`, of non-experts too with `of_all`. Finished layers are kept in its folder; a later run
    only repeats the forward pass."""
    pass_ = _Pass(family, scan, calibration, of_all)
    info = family.architecture
    with pass_.run, step_progress("Measuring on text", info.num_layers * info.num_experts, console) as advance:
        layers = [pass_.layer(layer, advance) for layer in range(info.num_layers)]
        factor, top1 = pass_.nats_per_error()
    partitions = tuple(found for found, _ in layers)
    table = ErrorTable(partitions, len(family.names))
    for layer, (_, errors) in enumerate(layers):
        for kind, target in enumerate((table.coherent, table.spread, table.base)):
            values = errors[kind]  # [E, N, V]
            target[layer, :, : values.shape[1]] = values[:, : target.shape[2]] * factor[:, layer] * _OTHER_TEXT
    nonexpert_nats = {} if pass_.probes is None else pass_.probes.nats()
    return replace(table.result(top1, np.array(pass_.traffic)), nonexpert_nats=nonexpert_nats)


class _Pass:
    """One run of the family with the probes appended to every variant's windows."""

    def __init__(self, family: Family, scan: FamilyScan, calibration: Calibration, of_all: bool) -> None:
        self.family, self.scan = family, scan
        info = family.architecture
        self.probes = NonexpertProbes(family, scan) if of_all else None
        self.copies = info.num_layers + (len(self.probes.groups) if self.probes is not None else 0) + 1
        texts = calibration.texts
        probes = [text.spread(_PROBES if text.inputs is None else _PROBE_PAIRS) for text in texts]
        whole = [text.followed_by(probe, self.copies) for text, probe in zip(texts, probes, strict=True)]
        rows = [range(len(text), len(with_copies)) for text, with_copies in zip(texts, whole, strict=True)]
        size = max(self.copies * probe.count() * v for probe, v in zip(probes, family.vocab_sizes, strict=True))
        self.run = FamilyRun(family, whole, rows, math.ceil(size / _LOGITS))
        for v, (text, probe) in enumerate(zip(texts, probes, strict=True)):
            if self.probes is not None:
                copies = Copies(len(text), len(probe), self.copies)
                self.probes.attach(self.run.model(v), v, copies, info.num_layers)
        sides = [kind_of(family.config).in_encoder(path) for path in info.expert_modules]
        self.tokens = [[text.count(side) for text in texts] for side in sides]  # [L, V], of the text
        self.copy_tokens = [[probe.count(side) for probe in probes] for side in sides]  # [L, V], of one copy
        self.transposed = is_transposed(family)
        self.traffic: list[FloatArray] = []  # of each layer, [E]
        self.noise = np.zeros((len(texts), info.num_layers))  # error put into the output, a token of a copy
        digest = hashlib.sha256(calibration.hash().encode())
        for v in range(len(family.names)):
            digest.update(scan.weights_hash(v).encode())
        self.folder = None if calibration.folder is None else calibration.folder / f"errors-{digest.hexdigest()[:24]}"

    def layer(self, layer: int, advance: Callable[[], None]) -> tuple[tuple[tuple[Partition, ...], ...], FloatArray]:
        """(partitions of each expert, float64 [3, E, N, V]: coherent, spread and base errors of the layer's output)."""
        routed, info = self.run.arrive(), self.family.architecture
        stacks = {
            tensor: [checkpoint.tensor(info.expert_tensor(layer, tensor)) for checkpoint in self.family.checkpoints]
            for tensor in mlp_order(list(info.expert_shapes))
        }
        found = self._read(layer)
        self.traffic.append(self._traffic(layer, routed))
        outputs: list[dict[int, tuple[Tensor, Tensor, Tensor]]] = [{} for _ in routed]
        partitions: list[tuple[Partition, ...]] = []
        errors = np.zeros((3, info.num_experts, 3, len(routed)))
        for expert in range(info.num_experts):
            weights: list[Matrices] = [
                {tensor: as_matrix(rows[v][expert], self.transposed).float() for tensor, rows in stacks.items()}
                for v in range(len(routed))
            ]
            partitions.append(partitions_of(_squares(weights, self.scan.expert_same_as[:, layer, expert])))
            statistics = []
            for v, one in enumerate(routed):
                rows, gates = one.tokens_of(expert)
                hidden = one.hidden[rows].float()
                outputs[v][expert] = rows, gates, self._outputs(layer, v, one, rows, gates, hidden, weights[v])
                if found is None:
                    own = rows < self.tokens[layer][v]
                    statistics.append(_Statistics(one, hidden[own], gates[own], weights[v], self.tokens[layer][v]))
            for n, partition in enumerate(partitions[-1] if found is None else ()):
                for group in partition:
                    errors[:, expert, n, list(group)] = _group_errors(
                        [weights[v] for v in group], [statistics[v] for v in group]
                    )
            advance()
        self.run.proceed([weighted_sum(one, pieces) for one, pieces in zip(routed, outputs, strict=True)])
        if found is not None:
            return tuple(partitions), found
        self._write(layer, errors)
        return tuple(partitions), errors

    def _traffic(self, layer: int, routed: list[Routed]) -> FloatArray:
        """float64 [E]: share of the text's routed tokens that each expert gets, the mean over the variants."""
        counts = []
        for one, tokens in zip(routed, self.tokens[layer], strict=True):
            index = one.index[:tokens].reshape(-1)
            counts.append(torch.bincount(index[index >= 0], minlength=self.family.architecture.num_experts).double())
        share: FloatArray = torch.stack([count / count.sum() for count in counts]).mean(dim=0).numpy()
        return share

    def _outputs(
        self, layer: int, v: int, routed: Routed, rows: Tensor, gates: Tensor, hidden: Tensor, weights: Matrices
    ) -> Tensor:
        """The expert's outputs [t, H], disturbed in this layer's copy of the probes."""
        out = down_projection(first_projection(routed.module, hidden, weights), weights)
        size = self.copy_tokens[layer][v]
        start = self.tokens[layer][v] + layer * size
        copy = (rows >= start) & (rows < start + size)
        if bool(copy.any()):
            noisy = {name: _disturbed(weight, layer) for name, weight in weights.items()}
            disturbed = down_projection(first_projection(routed.module, hidden[copy], noisy), noisy)
            error = (disturbed - out[copy]) * gates[copy][:, None]
            self.noise[v, layer] += float(error.square().sum()) / size
            out[copy] = disturbed
        return out

    def nats_per_error(self) -> tuple[FloatArray, FloatArray]:
        """(κ [V, L], 1 − top-1 agreement for a root of KL [V]), after the last layer."""
        logits, num_layers = self.run.logits(), self.family.architecture.num_layers
        factor, top1 = np.zeros_like(self.noise), np.zeros(len(logits))
        for v, whole in enumerate(logits):
            copies = whole.reshape(self.copies, -1, whole.shape[1])
            clean = copies[-1].log_softmax(dim=-1)
            shares = []
            for layer, copy in enumerate(copies[:-1]):
                served = copy.log_softmax(dim=-1)
                kl = float((clean.exp() * (clean - served)).sum(dim=-1).mean())
                if layer >= num_layers:
                    assert self.probes is not None
                    self.probes.kl[layer - num_layers, v] = max(kl, 0.0)
                    continue
                factor[v, layer] = max(kl, 0.0) / max(self.noise[v, layer], 1e-30)
                agreed = float((clean.argmax(dim=-1) == served.argmax(dim=-1)).float().mean())
                shares.append((1 - agreed) / math.sqrt(max(kl, 1e-9)))
            top1[v] = min(max(float(np.mean(shares)), TOP1_PER_ROOT_KL / 2), 2 * TOP1_PER_ROOT_KL)
        return factor, top1

    def _file(self, layer: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{layer}.npy"

    def _read(self, layer: int) -> FloatArray | None:
        path = self._file(layer)
        if path is None or not path.exists():
            return None
        found: FloatArray = np.load(path)
        return found

    def _write(self, layer: int, errors: FloatArray) -> None:
        path = self._file(layer)
        if path is not None:
            with whole_file(path) as unfinished, unfinished.open("wb") as file:
                np.save(file, errors)


class _Statistics:
    """What one expert of one variant sees and does. For each matrix: `moments` [I, I] a token of text, `gain` (error of
    the expert's output for an error of the matrix's), `rounding` (Σ_j 1 / U_jj² / I, or tr G / I without feedback)."""

    def __init__(self, routed: Routed, hidden: Tensor, gates: Tensor, weights: Matrices, num_tokens: int) -> None:
        first = "gate_up_proj" if routed.module.has_gate else "up_proj"
        seen = first_projection(routed.module, hidden, weights)
        self.moments, self.gain, self.rounding = {}, {first: 0.0, "down_proj": 1.0}, {}
        for name, inputs in ((first, hidden), ("down_proj", seen)):
            moment = second_moments([inputs], [gates], [num_tokens])[0]
            self.moments[name] = moment
            if len(inputs) >= FEW_TOKENS:
                left = float(inverse_factor(moment).diagonal().double().pow(-2).sum())
            else:
                left = float(moment.diagonal().sum())
            self.rounding[name] = left / moment.shape[0]
        if len(hidden):
            few, g = hidden[:_GAIN_ROWS], gates[:_GAIN_ROWS][:, None]
            noisy = {name: _disturbed(weight, 0) if name == first else weight for name, weight in weights.items()}
            at_first = torch.nn.functional.linear(few, noisy[first] - weights[first])
            out = torch.nn.functional.linear(
                first_projection(routed.module, few, noisy) - seen[:_GAIN_ROWS], weights["down_proj"]
            )
            put = float((at_first * g).square().sum())
            self.gain[first] = float((out * g).square().sum()) / max(put, 1e-30)


def _group_errors(weights: list[Matrices], statistics: list[_Statistics]) -> FloatArray:
    """float64 [3, group size]: `coherent`, `spread` and `base` of each member, as errors of the layer's output."""
    errors = np.zeros((3, len(weights)))
    for name in statistics[0].moments:
        own, moments = [one[name] for one in weights], [one.moments[name] for one in statistics]
        seen = any(float(moment.diagonal().sum()) > 0 for moment in moments)
        merged = weighted_mean(own, moments)
        served = regmean(own, moments) if seen and len(own) > 1 else merged
        norm = float(merged.square().sum())
        for index, (weight, one) in enumerate(zip(own, statistics, strict=True)):
            away = weight - served
            coherent = float(((away @ one.moments[name]) * away).sum())
            rounding = one.rounding[name]
            parts = (coherent, rounding * float((weight - merged).square().sum()), rounding * norm)
            errors[:, index] += one.gain[name] * np.maximum(parts, 0)
    return errors


def _disturbed(weight: Tensor, seed: int) -> Tensor:
    if weight.ndim == 1:
        return weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight + _NOISE * weight.std() * noise


def _squares(weights: list[Matrices], same_as: np.ndarray) -> FloatArray:
    """[V, V] as a position of `FamilyScan.pair_square`."""
    square = np.zeros((len(weights), len(weights)))
    for v, own in enumerate(weights):
        for w, other in enumerate(weights[: v + 1]):
            if v == w:
                square[v, v] = sum(float(tensor.square().sum()) for tensor in own.values())
            elif same_as[v] != same_as[w]:
                apart = sum(float((own[name] - other[name]).square().sum()) for name in own)
                square[v, w] = square[w, v] = apart
    return square
