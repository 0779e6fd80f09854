"""An engine that computes nothing: every running sequence gets a token a step, at a given pace.

    python -m benchmarks.server_cpu.null_engine --fd N

It speaks the engine's side of the socket; the pace and the variants' tokenizers come with the variables below.
"""

import argparse
import os
import random
import socket
import time
from pathlib import Path

from polymoe.engine.channel import Channel
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo
from polymoe.protocol.messages import Abort, Accepted, Add, GetStats, Outputs, Ready, Shutdown, Stats
from polymoe.protocol.request import EngineRequest, SequenceId, TokenOutput

STEP, FOLDERS = "NULL_ENGINE_STEP", "NULL_ENGINE_FOLDERS"  # seconds; NAME=FOLDER, separated by colons
VOCABULARY = 2048  # of the family that comes with the package
_TEXT = range(300, VOCABULARY)  # tokens that are neither special nor a part of a character


class NullEngine:
    def __init__(self, channel: Channel, step: float, folders: dict[str, Path]) -> None:
        self._channel, self._step, self._names = channel, step, list(folders)
        self._left: dict[SequenceId, int] = {}  # tokens still to come
        self._random = random.Random(0)
        variants = [
            VariantInfo(
                name=name, version="0" * 8, max_model_len=1 << 20, vocab_size=VOCABULARY, root="none", created=0,
                tokenizer_dir=str(folder), eos_token_ids=[1], generation={}, place=place,
            )
            for place, (name, folder) in enumerate(folders.items())
        ]  # fmt: skip
        self._info = EngineInfo(
            variants=variants, policy="none", resident_bytes={}, slots=len(variants), num_kv_blocks=1, block_size=16,
            experts_resident=0, experts_absent=0, max_concurrency=1.0, device="none", dtype="none",
        )  # fmt: skip

    def run(self) -> None:
        self._channel.receive(None)
        self._channel.send(Ready(self._info))
        due = time.monotonic()
        while True:
            wait = None if not self._left else max(0.0, due - time.monotonic())
            for command in self._channel.receive(wait):
                if isinstance(command, Shutdown):
                    return
                self._obey(command)
            if self._left and time.monotonic() >= due:
                due = max(due + self._step, time.monotonic())
                self._channel.send(Outputs([self._output(sequence) for sequence in list(self._left)]))

    def _output(self, sequence: SequenceId) -> TokenOutput:
        self._left[sequence] -= 1
        ended = not self._left[sequence]
        if ended:
            del self._left[sequence]
        reason = "length" if ended else None
        return TokenOutput(request_id=sequence, new_token_ids=[self._random.choice(_TEXT)], finish_reason=reason)

    def _obey(self, command: object) -> None:
        match command:
            case Add(submission, requests):
                self._left |= {request.request_id: _tokens(request) for request in requests}
                self._channel.send(Accepted(submission))
            case Abort(sequences):
                for sequence in sequences:
                    self._left.pop(sequence, None)
            case GetStats():
                self._channel.send(Stats(self._stats()))

    def _stats(self) -> EngineStats:
        none = [0] * len(self._names)
        return EngineStats(
            names=self._names, in_flight={}, added_bytes=0, running=[len(self._left), *none[1:]], waiting=none,
            kv_usage=0.0, prefix_cache_queries=none, prefix_cache_hits=none, preemptions=none, tokens_served=none,
            deadline_misses=none, reconfigurations=0, reconfiguration_seconds=0.0, reconfiguration_bytes=0,
            expert_hits=0, expert_misses=0, expert_host_bytes=0, expert_fetch_seconds=0.0, resident_bytes={},
        )  # fmt: skip


def _tokens(request: EngineRequest) -> int:
    return request.sampling.max_tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    pairs = [pair.split("=", 1) for pair in os.environ[FOLDERS].split(":")]
    folders = {name: Path(folder) for name, folder in pairs}
    channel = Channel(socket.socket(fileno=parser.parse_args().fd))
    try:
        NullEngine(channel, float(os.environ[STEP]), folders).run()
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main()
