"""The WebSocket at / and /vla-eval: messages in order, one at a time, until the client has gone.

openpi's client waits for a greeting, vla-eval's takes the first message for the answer to its HELLO: one map is both, so neither waits. The
first message that can be decoded says which dialect this is.
"""

import contextlib

from starlette.websockets import WebSocket, WebSocketDisconnect

from prismatic.serving import openpi, vla_eval
from prismatic.serving.codec import bytes_keys, read_msgpack, write_msgpack
from prismatic.serving.observation import RequestError
from prismatic.serving.service import Service


async def converse(socket: WebSocket) -> None:
    """Greet, then answer each message."""
    service: Service = socket.app.state.service
    client = "{}:{}".format(*socket.scope["client"])
    dialect: openpi.Openpi | vla_eval.VlaEval = openpi.Openpi(client)
    chosen = False
    with service.metrics.connections.track_inprogress(), contextlib.suppress(OSError):
        await socket.accept()
        await send(socket, write_msgpack({**service.metadata, **vla_eval.hello(service)}, bytes_keys))
        while (received := await socket.receive())["type"] == "websocket.receive":
            try:
                async with service.request(dialect.name, client) as line:
                    if received.get("bytes") is None:
                        raise RequestError("messages must be binary msgpack frames, not text")
                    message = await service.in_reader(read_msgpack, received["bytes"], service.limits)
                    if not chosen and vla_eval.is_message(message):
                        dialect = vla_eval.VlaEval(client)
                        line["dialect"] = dialect.name
                    chosen = True
                    asked = dialect.read(message, service.limits)
                    chunk = None if asked is None else service.close_positive(await service.ask(asked, line))
                    answer = dialect.write(chunk, line)
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
