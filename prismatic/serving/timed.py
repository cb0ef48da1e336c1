"""uvicorn's protocols with the two limits that it lacks: how many connections, and how long a request or message may take to arrive.

A client that dribbles bytes, or opens sockets and says nothing, is closed; no one else notices.
"""

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class _Deadline:
    """Closes a transport unless it is met."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._timer = seconds, None

    def expect(self, transport: Any, unfinished: bool) -> None:
        """unfinished: something has begun to arrive. The time runs from its first byte."""
        if unfinished and self._timer is None:
            self._timer: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(
                self.seconds, transport.abort
            )
        elif not unfinished and self._timer is not None:
            self._timer.cancel()
            self._timer = None


def keep_alive(connection: socket.socket) -> None:
    """The kernel asks a silent peer whether it is still there, and closes after some two minutes without an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def timed_protocols(connections: int, read_seconds: float) -> tuple[type[H11Protocol], type[WebSocketsSansIOProtocol]]:
    """The classes for HTTP and for WebSockets."""

    class Http(H11Protocol):
        """The time to a request's head; its body is timed where it is read."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.head = _Deadline(read_seconds)
            keep_alive(transport.get_extra_info("socket"))
            if len(self.connections) > connections:
                transport.write(FULL)
                transport.close()
                return
            self.head.expect(transport, unfinished=True)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            self.head.expect(self.transport, unfinished=self.conn.their_state is h11.IDLE)

        def connection_lost(self, exc: Exception | None) -> None:
            self.head.expect(self.transport, unfinished=False)
            super().connection_lost(exc)

    class Sockets(WebSocketsSansIOProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.message = _Deadline(read_seconds)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.message.expect(self.transport, unfinished=bool(self.frames or self.conn.reader.buffer))

        def connection_lost(self, exc: Exception | None) -> None:
            self.message.expect(self.transport, unfinished=False)
            super().connection_lost(exc)

    return Http, Sockets
