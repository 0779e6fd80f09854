"""Codes of 1 to 8 bits in bytes, in the layout that `polymoe.quant.format` describes."""

import torch
from torch import Tensor

from polymoe.quant.format import BLOCK_BYTES, PLANES, plane_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., I], each below 2^bits -> uint8 [..., bytes of a row]."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., I] with I = `inputs`."""
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        size = plane_bytes(width, inputs)
        plane = _unpack_plane(packed[..., start : start + size], width, inputs)
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + size, shift + width
    assert codes is not None
    assert start == packed.shape[-1], f"{packed.shape[-1]} bytes for {inputs} values of {bits} bits"
    return codes


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    per_byte, inputs, lead = 8 // bits, codes.shape[-1], codes.shape[:-1]
    whole = inputs // (BLOCK_BYTES * per_byte) * BLOCK_BYTES * per_byte
    out = [_fold(codes[..., :whole].reshape(*lead, -1, per_byte, BLOCK_BYTES), bits).flatten(-2)] if whole else []
    if whole < inputs:
        rest = codes[..., whole:]
        size = plane_bytes(bits, inputs - whole)
        rest = torch.nn.functional.pad(rest, (0, size * per_byte - rest.shape[-1]))
        out.append(_fold(rest.reshape(*lead, per_byte, size), bits))
    return torch.cat(out, dim=-1)


def _fold(codes: Tensor, bits: int) -> Tensor:
    """[..., values of a byte, bytes] -> [..., bytes]."""
    folded = codes[..., 0, :].clone()
    for index in range(1, codes.shape[-2]):
        folded |= codes[..., index, :] << (index * bits)
    return folded


def _unpack_plane(packed: Tensor, bits: int, inputs: int) -> Tensor:
    if bits == 8:
        return packed
    per_byte = 8 // bits
    whole = inputs // (BLOCK_BYTES * per_byte) * BLOCK_BYTES
    out = [_unfold(packed[..., :whole].reshape(*packed.shape[:-1], -1, BLOCK_BYTES), bits).flatten(-3)] if whole else []
    if whole < packed.shape[-1]:
        rest = _unfold(packed[..., whole:], bits).flatten(-2)
        out.append(rest[..., : inputs - whole * per_byte])
    return torch.cat(out, dim=-1)


def _unfold(packed: Tensor, bits: int) -> Tensor:
    """[..., bytes] -> [..., values of a byte, bytes]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    unfolded: Tensor = (packed[..., None, :] >> shifts) & (2**bits - 1)
    return unfolded
