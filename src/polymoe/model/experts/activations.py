"""In how many bits packed experts multiply activations."""

from polymoe.bundle.reader import Bundle
from polymoe.kernels.cpu.tiles import ACTIVATIONS, Activations

# Bytes of bases and deltas over one model's expert parameters, up to which fewer bits of activations cost less than a
# tenth of what the plan itself costs (docs/quality.md has the figures).
_INT8_UP_TO, _MIXED_UP_TO = 1.3, 2.2


def activations_for(asked: str, bundle: Bundle) -> Activations:
    """`asked`: "auto" or a name of `ACTIVATIONS`."""
    if asked != "auto":
        return ACTIVATIONS[asked]
    size = bundle.manifest.bytes_per_expert_parameter
    return ACTIVATIONS["int8" if size <= _INT8_UP_TO else "mixed" if size <= _MIXED_UP_TO else "int16"]
