"""What the endpoint pickers of the Gateway API inference extension and of llm-d read, under the names and with the
meanings of their model-server protocol; docs/deploy.md says how to point them here.

A variant in a slot is to them what a loaded LoRA adapter is: they send its requests to a server that has it.
"""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from polymoe.protocol.info import EngineInfo, EngineStats


def endpoint_picker_metrics(info: EngineInfo, stats: EngineStats, taken_at: float) -> Iterator[Metric]:
    """Each family has one sample, as a picker reads only the first. taken_at: seconds since the epoch."""
    # The protocol's gauges are of the whole server, where `vllm:num_requests_…` have a sample for each variant.
    for name, text, counts in (
        ("polymoe:requests_waiting", "Sequences waiting, of all variants.", stats.waiting),
        ("polymoe:requests_running", "Sequences in the batch, of all variants.", stats.running),
    ):
        yield GaugeMetricFamily(name, text, value=sum(counts))
    names = stats.names
    loaded = {names[index] for index in stats.loaded}
    waiting = [name for name, count in zip(names, stats.waiting, strict=True) if count and name not in loaded]
    variants = GaugeMetricFamily(
        "vllm:lora_requests_info", "Variants in slots, and those that wait for one; the value is the time.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )  # fmt: skip
    resident = [name for name in names if name in loaded]
    variants.add_metric([str(info.slots), ",".join(resident), ",".join(waiting)], taken_at)
    yield variants
