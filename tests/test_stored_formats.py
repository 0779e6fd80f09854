"""Checkpoints in few bits are read as transformers dequantises them, tensor by tensor, and refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, CompressedTensorsDequantizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import make_family
from polymoe.errors import CheckpointError, UnsupportedModelError
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from quantised import COMPRESSED, rewrite, store_awq, store_block_fp8, store_compressed, store_gptq, store_mxfp4
from references import dequantised


def assert_reads_as_dequantised(path: Path, dtype: torch.dtype) -> Checkpoint:
    """All weights equal those of transformers, which dequantises where there is no GPU."""
    checkpoint = Checkpoint.open(path, "x")
    want = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **dequantised(path)).state_dict()
    assert set(checkpoint.target_names) | set(checkpoint.tied) == set(want)
    for name in checkpoint.target_names:
        tensor = checkpoint.tensor(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (checkpoint.dtype(name), checkpoint.shape(name)), name
        assert torch.equal(tensor, want[name]), name
    return checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_family("qwen3_moe", tmp_path, num_variants=1, dtype=dtype)["base"]
    store_block_fp8(path)
    want = assert_reads_as_dequantised(path, dtype)
    stack_experts(path)
    again = Checkpoint.open(path, "x")
    assert all(torch.equal(want.tensor(name), again.tensor(name)) for name in want.target_names)


def stack_experts(path: Path) -> None:
    """As transformers 5 saves an FP8 model; its own reader (5.23) then leaves the scales of stacks out on a CPU."""
    tensors = load_file(path / "model.safetensors")
    stacked: dict[str, torch.Tensor] = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        for leaf, suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            each = [[tensors[f"{prefix}{e}.{m}_proj.{leaf}"] for e in range(8)] for m in ("gate", "up", "down")]
            gate, up, down = (torch.stack(one) for one in each)
            stacked[f"{prefix}gate_up_proj{suffix}"] = torch.cat([gate, up], dim=1)
            stacked[f"{prefix}down_proj{suffix}"] = down
    save_file(stacked, path / "model.safetensors", {"format": "pt"})


def test_a_block_that_is_cut(tmp_path: Path) -> None:
    """DeepSeek-V3 has 576 rows in blocks of 128; transformers 5 to 5.23 refuse such a matrix, or where the number of
    blocks divides its sides take blocks of another size."""
    path = make_family("qwen3_moe", tmp_path, num_variants=1)["base"]
    want = load_file(path / "model.safetensors")
    store_block_fp8(path, block=(24, 20))
    stored = load_file(path / "model.safetensors")
    checkpoint = Checkpoint.open(path, "x")
    for part in ("q", "k", "v", "o"):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        scale = stored[f"{name}_scale_inv"].repeat_interleave(24, 0).repeat_interleave(20, 1)
        rows, columns = want[name].shape
        assert torch.equal(checkpoint.tensor(name), stored[name].float() * scale[:rows, :columns])
        torch.testing.assert_close(checkpoint.tensor(name), want[name], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4(dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_family("gpt_oss", tmp_path, num_variants=1, dtype=dtype, intermediate_size=32)["base"]
    want = load_file(path / "model.safetensors")
    store_mxfp4(path)
    checkpoint = assert_reads_as_dequantised(path, dtype)
    name = "model.layers.1.mlp.experts.down_proj"
    error = (checkpoint.tensor(name).float() - want[name].float()).norm() / want[name].float().norm()
    assert 0.01 < error < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_family("qwen3_moe", tmp_path, num_variants=1, dtype=dtype, intermediate_size=32)["base"]
    plain = Checkpoint.open(path, "plain")
    want = {name: plain.tensor(name).float() for name in plain.target_names}
    store_compressed(path, kind)
    stored = load_file(path / "model.safetensors")
    parts = {name: tensor for name, tensor in stored.items() if f"{name.rpartition('.')[0]}.weight_scale" in stored}
    made = CompressedTensorsDequantizer(path, dtype=dtype).process(parts)  # what the package itself makes of them
    checkpoint = assert_weights(path, made)
    if kind in ("int4_group", "int8_packed"):  # of the others' experts transformers 5.23 loses a part, or fails
        assert_reads_as_dequantised(path, dtype)
    most = 0.04 if kind.startswith(("int8", "fp8")) else 0.2
    errors = {n: (checkpoint.tensor(n).float() - w).norm() / w.norm() for n, w in want.items() if n.endswith("_proj")}
    assert 0 < max(errors.values()) < most


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits: int, act_order: bool, version: int, tmp_path: Path) -> None:
    path = make_family("qwen3_moe", tmp_path, num_variants=1, intermediate_size=32)["base"]
    assert_weights(path, store_gptq(path, bits, act_order=act_order, version=version))


def test_awq(tmp_path: Path) -> None:
    path = make_family("qwen3_moe", tmp_path, num_variants=1, intermediate_size=32)["base"]
    assert_weights(path, store_awq(path))
    stored = load_file(path / "model.safetensors")
    module = "model.layers.0.self_attn.k_proj"
    parts = {name: tensor for name, tensor in stored.items() if name.startswith(f"{module}.q") or "k_proj.s" in name}
    converted = AutoAWQConverter(group_size=8).process(dict(parts))  # the same weights in compressed-tensors' format
    made = {name.rpartition(".")[2]: tensor for name, tensor in converted.items() if name.startswith(f"{module}.")}
    scheme = next(iter(AutoAWQConverter(group_size=8).update_config(None).config_groups.values()))
    want = BaseCompressor.get_value_from_registry("pack-quantized").decompress(made, scheme)["weight"]
    assert torch.equal(Checkpoint.open(path, "x").tensor(f"{module}.weight").half(), want)


def assert_weights(path: Path, want: dict[str, torch.Tensor]) -> Checkpoint:
    """`want`: stored name, with one tensor an expert -> weight."""
    checkpoint = Checkpoint.open(path, "x")
    for name in checkpoint.target_names:
        tensor = checkpoint.tensor(name)
        if name.endswith(".experts.gate_up_proj"):
            each = [
                torch.cat([want[f"{name[:-12]}{e}.{m}_proj.weight"] for m in ("gate", "up")])
                for e in range(len(tensor))
            ]
            assert torch.equal(tensor, torch.stack(each)), name
        elif name.endswith(".experts.down_proj"):
            each = [want[f"{name[:-9]}{e}.down_proj.weight"] for e in range(len(tensor))]
            assert torch.equal(tensor, torch.stack(each)), name
        elif name in want:
            assert torch.equal(tensor, want[name]), name
    return checkpoint


class TestRefused:
    @pytest.fixture
    def fp8(self, tmp_path: Path) -> Path:
        path = make_family("qwen3_moe", tmp_path, num_variants=1)["base"]
        store_block_fp8(path)
        return path

    def edit(self, path: Path, remove: str | None = None, add: dict[str, torch.Tensor] | None = None) -> None:
        tensors = load_file(path / "model.safetensors")
        if remove is not None:
            del tensors[remove]
        save_file(tensors | (add or {}), path / "model.safetensors", {"format": "pt"})

    def test_a_method_that_is_not_read(self, fp8: Path) -> None:
        rewrite(fp8, load_file(fp8 / "model.safetensors"), {"quant_method": "bitsandbytes"})
        with pytest.raises(UnsupportedModelError, match=rf"^x: {fp8}: .*\(bitsandbytes\).*not read.*dequantize\(\)"):
            Checkpoint.open(fp8, "x")

    def test_scales_without_a_weight(self, fp8: Path) -> None:
        name = "model.layers.0.mlp.experts.5.up_proj.weight"
        self.edit(fp8, remove=name)
        with pytest.raises(CheckpointError, match=f"^x: {fp8}: {name}_scale_inv is stored without {name}"):
            Checkpoint.open(fp8, "x")

    def test_a_weight_without_scales(self, fp8: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        self.edit(fp8, remove=f"{name}_scale_inv")
        with pytest.raises(UnsupportedModelError, match=f"^x: {fp8}: {name} is stored as F8_E4M3"):
            Checkpoint.open(fp8, "x")

    def test_scales_of_another_shape(self, fp8: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        self.edit(fp8, add={f"{name}_scale_inv": torch.ones(3, 5)})
        with pytest.raises(CheckpointError, match=rf"^x: {fp8}: {name} of shape \[64, 32\] does not fit .*\[3, 5\]"):
            Checkpoint.open(fp8, "x")

    def test_nothing_is_stored_so(self, tmp_path: Path) -> None:
        path = make_family("mixtral", tmp_path, num_variants=1)["base"]
        rewrite(path, load_file(path / "model.safetensors"), {"quant_method": "fp8"})
        with pytest.raises(CheckpointError, match=f"^x: {path}: .*quantised .fp8., but none is stored so; remove"):
            Checkpoint.open(path, "x")

    def test_blocks_without_scales(self, tmp_path: Path) -> None:
        path = make_family("gpt_oss", tmp_path, num_variants=1, intermediate_size=32)["base"]
        store_mxfp4(path)
        name = "model.layers.0.mlp.experts.down_proj"
        self.edit(path, remove=f"{name}_scales")
        with pytest.raises(CheckpointError, match=f"^x: {path}: {name}_blocks is stored without {name}_scales"):
            Checkpoint.open(path, "x")


def test_a_weight_and_its_scales_in_different_shards(tmp_path: Path) -> None:
    path = make_family("qwen3_moe", tmp_path, num_variants=1)["base"]
    store_block_fp8(path)
    want = Checkpoint.open(path, "x")
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    shard(copy, 3)
    again = Checkpoint.open(copy, "x")
    assert all(torch.equal(want.tensor(name), again.tensor(name)) for name in want.target_names)


def shard(path: Path, count: int) -> None:
    """Spread model.safetensors over `count` files in turn, so that a weight and its scales lie apart."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    where = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
