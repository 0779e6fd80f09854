"""The engine's end of the socket to the server."""

import select
import socket

from polymoe.protocol.messages import HEADER_BYTES, Command, Message, body_length, decode_command, frame


class Channel:
    """The engine's end of the socket. `EOFError` or `OSError` from any method: the server is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def send(self, message: Message) -> None:
        self._sock.sendall(frame(message))

    def receive(self, wait_for: float | None) -> list[Command]:
        """All commands that have arrived; waits for one, for so many seconds, None: for ever."""
        commands: list[Command] = []
        while True:
            wait = 0 if commands else wait_for
            if not select.select([self._sock], [], [], wait)[0]:
                return commands
            data = self._sock.recv(1 << 20)
            if not data:
                raise EOFError
            self._buffer += data
            commands += self._take_frames()

    def _take_frames(self) -> list[Command]:
        commands = []
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            end = body + body_length(bytes(self._buffer[start:body]))
            if end > len(self._buffer):
                break
            commands.append(decode_command(bytes(self._buffer[body:end])))
            start = end
        del self._buffer[:start]
        return commands
