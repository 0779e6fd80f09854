"""What the endpoints of one server share."""

import time
from dataclasses import dataclass, field

from polymoe.client.client import AsyncEngineClient
from polymoe.client.interface import EngineClient
from polymoe.server.encoding import Encoder
from polymoe.server.errors import UnavailableError
from polymoe.server.metrics import Metrics
from polymoe.server.request_log import RequestLog
from polymoe.server.settings import ServerSettings
from polymoe.server.snapshots import Snapshots
from polymoe.server.traces import Tracer
from polymoe.server.variants import Variants


@dataclass
class ServerState:
    client: EngineClient
    settings: ServerSettings
    metrics: Metrics = field(default_factory=Metrics)
    encoder: Encoder = field(default_factory=Encoder)
    in_flight: int = 0  # requests whose answer is not complete, but for those of probes and scrapes
    requests: RequestLog = field(default_factory=RequestLog)
    tracer: Tracer | None = None
    draining: bool = False
    preparing: bool = False  # the engine may be ready, the server is not
    progress: tuple[str, float] = ("starting", 0.0)  # stage, fraction done
    started: int = field(default_factory=lambda: int(time.time()))
    variants: Variants = field(init=False)

    def __post_init__(self) -> None:
        self.variants = Variants(self.client, self.settings, self._switch)
        self.snapshots = Snapshots(self)

    @property
    def revision(self) -> int:
        """Of the set of variants: it grows with each change."""
        return self.variants.revision

    def _switch(self, client: AsyncEngineClient) -> None:
        """From now on requests go to another engine."""
        self.client = client

    def set_progress(self, stage: str, fraction: float) -> None:
        self.progress = (stage, fraction)

    def require_alive(self) -> None:
        """Raises `UnavailableError` when the engine has died or hangs."""
        client = self.client
        if client.dead.is_set():
            raise UnavailableError("The engine has stopped.", code="engine_dead")
        if client.is_stuck(self.settings.heartbeat_timeout):
            raise UnavailableError("The engine makes no progress.", code="engine_stuck")

    def require_ready(self) -> None:
        """Raises `UnavailableError` unless requests are welcome."""
        self.require_alive()
        if self.draining:
            raise UnavailableError("The server is shutting down.", code="draining")
        if self.preparing or not self.client.is_ready:
            stage, fraction = self.progress
            raise UnavailableError(f"The model is loading: {stage}, {fraction:.0%}.", code="loading")
