"""What to do with an absent expert that a decode step needs: compute it on the host, or bring it to the device.

    host:   send the rows, read the expert from the host's memory while multiplying, send the result back
    fetch:  read the expert over the bus, which pays again each time the expert is found in the cache
    mapped: the kernel reads it over the bus while multiplying, and nobody has to learn which experts a step needs

An expert that is in the cache costs neither, so nothing is decided about it. With many rows (prefill) the host's
arithmetic is the limit, with few its memory. Pure arithmetic over measured constants.
"""

from dataclasses import dataclass

# What a layer takes longer when its operations are launched one by one, not in a graph, in seconds. An estimate.
_LAUNCH_S = 3e-4


@dataclass(frozen=True)
class TierCosts:
    """Constants of one machine, measured when an engine with absent experts starts."""

    bus_bytes_per_s: float  # pinned host memory to the device
    bus_latency_s: float  # of one copy
    host_bytes_per_s: float  # weights read by the host while it multiplies a few rows
    host_flops: float  # of the host's matmuls with many rows
    exchange_s: float  # rows to the host and results back, waiting included
    mapped_bytes_per_s: float  # a kernel that multiplies a row with weights in pinned host memory

    def fetch_seconds(self, expert_bytes: int) -> float:
        return self.bus_latency_s + expert_bytes / self.bus_bytes_per_s

    def host_seconds(self, rows: int, expert_bytes: int, expert_parameters: int) -> float:
        """For `rows` tokens: reading and multiplying overlap."""
        reading, multiplying = expert_bytes / self.host_bytes_per_s, 2 * rows * expert_parameters / self.host_flops
        return self.exchange_s + max(reading, multiplying)

    def on_host(self, rows: int, expert_bytes: int, expert_parameters: int, uses: float = 1.0) -> bool:
        """Whether the host should compute.

        Args:
            uses: how often a fetched expert is used before it leaves the cache, this time included; at least 1.
        """
        assert uses >= 1
        return self.host_seconds(rows, expert_bytes, expert_parameters) < self.fetch_seconds(expert_bytes) / uses

    def decodes_mapped(self, expert_bytes: int, expert_parameters: int, uses: float) -> bool:
        """Whether decode steps should read absent experts in the kernel: one answer for all experts of a model, since
        it is steps that never wait that can be captured.

        Args:
            uses: absent experts that a layer needs in a step with one token, in the mean.
        """
        one = min(self.host_seconds(1, expert_bytes, expert_parameters), self.fetch_seconds(expert_bytes))
        return uses * expert_bytes / self.mapped_bytes_per_s <= self.exchange_s + _LAUNCH_S + uses * one
