"""uvicorn's protocols with the two limits that it lacks: how many connections, and how long a request or message may take to arrive.

A client that dribbles bytes, or opens sockets and says nothing, is closed; no one else notices.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def timed_protocols(connections: int, read_seconds: float) -> tuple[type[H11Protocol], type[WebSocketsSansIOProtocol]]:
    """The classes for HTTP, where the time to a request's head counts (its body is timed where it is read), and for WebSockets' messages."""
    return (
        _timed(H11Protocol, connections, read_seconds, lambda http: http.conn.their_state is h11.IDLE),
        _timed(
            WebSocketsSansIOProtocol, connections, read_seconds, lambda ws: bool(ws.frames or ws.conn.reader.buffer)
        ),
    )


def _timed(protocol: Any, connections: int, read_seconds: float, unfinished: Callable[[Any], bool]) -> Any:
    """unfinished: whether more must arrive. The time runs from its first byte."""

    class Timed(protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > connections:
                transport.write(FULL)
                transport.close()
            else:
                self.set_timer()

        def data_received(self, data: bytes) -> None:
            if not self.transport.is_closing():
                super().data_received(data)
                self.set_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_timer()
            super().connection_lost(exc)

        def set_timer(self) -> None:
            if not unfinished(self):
                self.stop_timer()
            elif self.timer is None:
                self.timer = asyncio.get_running_loop().call_later(read_seconds, self.transport.abort)

        def stop_timer(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return Timed
