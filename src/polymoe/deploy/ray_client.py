"""The engines of a deployment as the HTTP application sees them: an `EngineClient` over Ray Serve's handles."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from polymoe.client.interface import Prompt
from polymoe.client.output import OutputProcessor
from polymoe.client.request_stream import RequestStream
from polymoe.config import EngineConfig
from polymoe.deploy.merge import merged_info, merged_stats
from polymoe.deploy.wire import Generate, decode_answer, encode
from polymoe.errors import EngineDeadError, PolymoeError, RequestError
from polymoe.protocol.info import EngineInfo, EngineStats
from polymoe.protocol.messages import Accepted, Rejected
from polymoe.protocol.request import QoS, SamplingParams

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_EQUAL = QoS()
_PREFIX_TOKENS = 64  # of a prompt's beginning, by which requests that share one find the same replica
_ATTEMPTS = 4


class RayClient:
    """Knows the pools by name; each is a deployment whose handle routes to one of its replicas.

    Args:
        pools: name -> handle.
        shares: pool -> variant -> part of the variant's requests that goes there.
        config: of one of the pools, whose bundle the dashboard describes.
    """

    def __init__(
        self, pools: Mapping[str, DeploymentHandle], shares: Mapping[str, Mapping[str, float]], config: EngineConfig
    ) -> None:
        self.config = config
        self.heartbeat_every = 10.0  # nobody's: Ray asks each replica itself
        self.dead = asyncio.Event()  # never set: Ray replaces replicas that die
        self._pools, self._shares = dict(pools), shares
        self._infos: dict[str, EngineInfo] = {}
        self._info: EngineInfo | None = None
        self._processor: OutputProcessor | None = None
        self._handles: dict[tuple[str, str], Any] = {}  # (pool, variant) -> the handle's method, with options
        self._homes: dict[str, tuple[list[str], list[float]]] = {}  # variant -> pools and their parts
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life

    async def start(self) -> None:
        """Wait for a replica of each pool, and load the tokenizers."""
        answers = await asyncio.gather(*(handle.info.remote() for handle in self._pools.values()))
        self._infos = {
            pool: msgspec.msgpack.decode(answer, type=EngineInfo)
            for pool, answer in zip(self._pools, answers, strict=True)
        }
        info = merged_info(self._infos)
        processor = OutputProcessor(info)
        await asyncio.to_thread(processor.load_tokenizers)
        for variant in processor.variants:
            homes = [pool for pool, one in self._infos.items() if any(v.name == variant for v in one.variants)]
            self._homes[variant] = homes, [self._shares.get(pool, {}).get(variant, 1.0) for pool in homes]
        self._info, self._processor = info, processor

    def fail_all(self) -> None:
        """End every stream with an error."""
        for task in list(self._tasks):
            task.cancel()

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDeadError("The engines have not started.")
        return self._info

    @property
    def processor(self) -> OutputProcessor:
        if self._processor is None:
            raise EngineDeadError("The engines have not started.")
        return self._processor

    @property
    def is_ready(self) -> bool:
        return self._processor is not None

    @property
    def open_streams(self) -> list[str]:
        return [task.get_name() for task in self._tasks]

    def is_stuck(self, timeout: float) -> bool:
        """Never: Ray asks each replica itself."""
        del timeout
        return False

    async def stats(self, routing: bool = False) -> EngineStats:
        """Of all replicas together, without the routing of tokens. Raises `EngineDeadError` when none answers."""
        del routing
        parts = []
        for pool, handle in self._pools.items():
            for answer in await handle.broadcast("stats").results_async(timeout_s=5.0, return_exceptions=True):
                if isinstance(answer, bytes):
                    parts.append((self._infos[pool], msgspec.msgpack.decode(answer, type=EngineStats)))
        if not parts:
            raise EngineDeadError("No replica answers.")
        return merged_stats(self.info, parts)

    # --- requests

    async def submit(
        self,
        request_id: str,
        variant: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
        qos: QoS = _EQUAL,
        whole: bool = True,
    ) -> RequestStream:
        """As `AsyncEngineClient.submit`; the results are whole in any case. What is wrong with a request is found by
        the replica.

        A replica that is lost before anybody has seen a part of the answer is replaced by another one.
        """
        del whole
        self.processor.variant(variant)
        asked = Generate(
            request_id=request_id, variant=variant, prompts=list(prompts), sampling=sampling, cache_salt=cache_salt,
            qos=qos,
        )  # fmt: skip
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def abort(_: list[str]) -> None:
            pump.cancel()

        stream = RequestStream(request_id, len(prompts), abort, sampling.n)
        pump = asyncio.create_task(self._pump(asked, stream, accepted), name=request_id)
        self._tasks.add(pump)
        pump.add_done_callback(self._tasks.discard)
        try:
            await accepted
        except BaseException:
            pump.cancel()
            raise
        return stream

    async def _pump(self, asked: Generate, stream: RequestStream, accepted: asyncio.Future[None]) -> None:
        """Answers from a replica to the stream, from another replica where the first is lost."""
        try:
            for attempt in range(_ATTEMPTS):
                response = self._send(asked)
                try:
                    await _receive(response, stream, accepted)
                    return
                except RequestError as error:
                    _fail(stream, accepted, error)
                    return
                except asyncio.CancelledError:
                    raise
                except Exception as error:
                    logger.warning("A replica was lost (%s): %s", asked.variant, _first_line(error))
                    if attempt + 1 == _ATTEMPTS or not stream.restart():
                        _fail(stream, accepted, EngineDeadError("The engine stopped; the request cannot finish."))
                        return
                finally:
                    response.cancel()  # what has ended is not touched by it
                await asyncio.sleep(0.05 * 4**attempt)
        except asyncio.CancelledError:
            _fail(stream, accepted, EngineDeadError("The request was ended."))
            raise

    def _send(self, asked: Generate) -> Any:
        homes, parts = self._homes[asked.variant]
        pool = homes[0] if len(homes) == 1 else random.choices(homes, parts)[0]
        key = (pool, asked.variant)
        if key not in self._handles:
            self._handles[key] = self._pools[pool].options(
                method_name="generate", stream=True, multiplexed_model_id=asked.variant
            )
        return self._handles[key].remote(encode(asked), prefix=_prefix(asked))


async def _receive(response: Any, stream: RequestStream, accepted: asyncio.Future[None]) -> None:
    """Raises what the replica refuses, and whatever Ray raises for a lost one."""
    async for data in response:
        match decode_answer(data):
            case Accepted():
                if not accepted.done():
                    accepted.set_result(None)
            case Rejected() as rejected:
                raise rejected.error()
            case answer:
                for chunk in answer.chunks:
                    stream.push_chunk(chunk)
                for result in answer.results:
                    stream.push_result(result)
    if not stream.is_complete:
        raise EngineDeadError("The replica ended the answer early.")


def _fail(stream: RequestStream, accepted: asyncio.Future[None], error: PolymoeError) -> None:
    if accepted.done():
        stream.fail(error)
    else:
        accepted.set_exception(error)
        accepted.exception()  # taken note of, even if nobody awaits it


def _prefix(asked: Generate) -> str:
    """A name for the beginning of the prompt, of this variant and tenant; "" for a short one."""
    tokens = asked.prompts[0][1][:_PREFIX_TOKENS]
    if len(tokens) < _PREFIX_TOKENS:
        return ""
    content = f"{asked.variant}\0{asked.cache_salt}\0{tokens}"
    return blake2b(content.encode(), digest_size=12).hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
