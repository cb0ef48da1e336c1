"""The WebSocket at / and /vla-eval: messages in order, one at a time, until the client has gone.

openpi's client waits for a greeting, vla-eval's takes the first message for the answer to its HELLO: one map is both, so neither waits. The
first message that can be decoded says which dialect this is.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from prismatic.serving import openpi, vla_eval
from prismatic.serving.codec import bytes_keys, read_msgpack, write_msgpack
from prismatic.serving.observation import Limits, Observation, RequestError
from prismatic.serving.service import Service


class Dialect(Protocol):
    """How a client is answered. One object a connection."""

    name: str
    close_code: int | None  # of the connection after a refusal; None: it stays open

    def read(self, message: Any, limits: Limits) -> Observation | None:
        """What the policy is asked by a decoded message, None for nothing. RequestError for one that can't be answered."""

    def write(self, chunk: np.ndarray | None, timing: Mapping[str, float]) -> bytes | None:
        """The answer to the message last read, None where none is due. chunk: (K, D), gripper -1 open … +1 close."""

    def refusal(self, error: RequestError) -> bytes | str:
        """Says what was wrong with the message last read."""
        ...


async def converse(socket: WebSocket) -> None:
    """Greet, then answer each message."""
    service: Service = socket.app.state.service
    client = f"{socket.client.host}:{socket.client.port}" if socket.client else "?"
    greeting = {**openpi.metadata(service), **vla_eval.hello(service)}
    dialect: Dialect = openpi.Openpi(client)
    data: bytes | None = None
    chosen = False

    def read() -> Observation | None:
        nonlocal dialect, chosen
        if data is None:
            raise RequestError("messages must be binary msgpack frames, not text")
        message = read_msgpack(data, service.limits)
        if not chosen and vla_eval.is_message(message):
            request.dialect = dialect = vla_eval.VlaEval(client)
        chosen = True
        return dialect.read(message, service.limits)

    with service.metrics.connections.track_inprogress(), contextlib.suppress(OSError):
        await socket.accept()
        await send(socket, write_msgpack(greeting, bytes_keys))
        while (received := await socket.receive())["type"] == "websocket.receive":
            data = received.get("bytes")
            try:
                async with service.request(dialect, client) as request:
                    chunk = await request.ask(read)
                    answer = dialect.write(None if chunk is None else service.close_positive(chunk), request.timing)
                    if answer is not None:
                        await send(socket, answer)
            except RequestError as error:
                await send(socket, dialect.refusal(error))
                if dialect.close_code is not None:
                    await socket.close(dialect.close_code)


async def send(socket: WebSocket, data: bytes | str) -> None:
    """ConnectionResetError when the client has gone."""
    try:
        await (socket.send_text(data) if isinstance(data, str) else socket.send_bytes(data))
    except (WebSocketDisconnect, RuntimeError) as error:  # uvicorn's RuntimeError: it has closed the socket
        raise ConnectionResetError from error
