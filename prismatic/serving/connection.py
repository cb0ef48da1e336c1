"""One WebSocket connection of any dialect: messages in order, one at a time, until the client has gone."""

from collections.abc import Callable
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from prismatic.serving.codec import read_msgpack
from prismatic.serving.observation import RequestError
from prismatic.serving.service import Request, Service


class Connection:
    """stream: names this robot in the policy's memory of last answers."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self.socket, self.service = socket, service
        self.stream = ("connection", service.connection())
        self.client = f"{socket.client.host}:{socket.client.port}" if socket.client else "?"

    async def receive(self) -> bytes | str:
        """The next message. ConnectionResetError when the client has gone, here and below."""
        message = await self._while_there(self.socket.receive())
        if message["type"] != "websocket.receive":
            raise ConnectionResetError
        return message["bytes"] if message.get("bytes") is not None else message["text"]

    async def decode(self, data: bytes | str) -> Any:
        """What a message says. RequestError for text."""
        if not isinstance(data, bytes):
            raise RequestError("messages must be binary msgpack frames, not text")
        return await self.service.in_thread(read_msgpack, data, self.service.limits)

    async def send(self, data: bytes | str) -> None:
        await self._while_there(
            self.socket.send_bytes(data) if isinstance(data, bytes) else self.socket.send_text(data)
        )

    async def close(self, code: int) -> None:
        await self._while_there(self.socket.close(code))

    async def _while_there(self, step: Any) -> Any:
        try:
            return await step
        except (WebSocketDisconnect, RuntimeError) as error:  # starlette: RuntimeError for a socket that is closed
            raise ConnectionResetError from error


class Dialect(Protocol):
    """How a client is answered. One object a connection."""

    name: str

    async def reply(self, request: Request, message: Any) -> None:
        """Answer a decoded message. RequestError for one that can't be answered."""

    async def refuse(self, error: RequestError) -> None:
        """Say what was wrong with the last message."""


async def converse(connection: Connection, dialect: Dialect, choose: Callable[[Any], Dialect] | None = None) -> None:
    """Answer each message. choose: the dialect by the first message that can be decoded; None: it is known."""
    while True:
        data = await connection.receive()
        try:
            async with connection.service.request(dialect.name, connection.client) as request:
                message = await connection.decode(data)
                if choose is not None:
                    dialect, choose = choose(message), None
                    request.dialect = dialect.name
                await dialect.reply(request, message)
        except RequestError as error:
            await dialect.refuse(error)
