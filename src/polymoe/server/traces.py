"""OpenTelemetry spans of requests: one for each sequence, with its parts queue, prefill and decode.

Nothing of it is loaded unless OpenTelemetry's own variables ask for traces; they also say where spans are sent.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from polymoe.errors import ConfigError
from polymoe.server.http_request import HttpRequest

_ASKING = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracer_from_environment(environment: Mapping[str, str] = os.environ) -> "Tracer | None":
    """None unless a variable names an endpoint. Raises `ConfigError` where OpenTelemetry is not installed."""
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    off = off or environment.get("OTEL_TRACES_EXPORTER", "otlp").lower() == "none"
    if off or not any(environment.get(name) for name in _ASKING):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, and OpenTelemetry is not installed: pip install "
            f"'polymoe[otel]', or unset the variable. ({error})"
        ) from error
    name = environment.get("OTEL_SERVICE_NAME", "polymoe")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)


class Tracer:
    """Args: provider: an `opentelemetry.sdk.trace.TracerProvider`."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._provider = trace, provider
        self._tracer = provider.get_tracer("polymoe")
        self._propagator = TraceContextTextMapPropagator()

    def sequence_ended(
        self, record: HttpRequest, timing: tuple[float, float, float], num_tokens: int, finish_reason: str
    ) -> None:
        """Called when its last token has come. timing: seconds in the queue, of prefill and of decode, which the engine
        measured; the server's own part of the request lies around them."""
        now = time.time_ns()
        arrived = now - int((time.monotonic() - record.started) * 1e9)
        carrier = {} if record.traceparent is None else {"traceparent": record.traceparent}
        attributes = {
            "gen_ai.system": "polymoe",
            "gen_ai.request.model": record.variant or "",
            "gen_ai.response.id": record.engine_id or "",
            "gen_ai.response.finish_reasons": [finish_reason],
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": num_tokens,
            "http.request.method": record.method,
            "url.path": record.path,
            "polymoe.request_id": record.request_id,
        }
        root = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            start_time=arrived,
            attributes=attributes,
        )
        within = self._trace.set_span_in_context(root)
        begin = now - int(sum(timing) * 1e9)
        for name, seconds in zip(("queue", "prefill", "decode"), timing, strict=True):
            span = self._tracer.start_span(name, context=within, start_time=begin)
            begin += int(seconds * 1e9)
            span.end(end_time=begin)
        root.end(end_time=now)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
