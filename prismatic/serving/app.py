"""Which path is answered by what. In: a Service and an API key. Out: an ASGI application, and a uvicorn server for it."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from prismatic.serving import openpi, vla_eval
from prismatic.serving.batching import Busy
from prismatic.serving.codec import bytes_keys, write_msgpack
from prismatic.serving.connection import Connection, Dialect, converse
from prismatic.serving.guard import Guard
from prismatic.serving.observation import Limits, RequestError
from prismatic.serving.openvla import OPENVLA, ActRequest, write_request
from prismatic.serving.service import Service
from prismatic.serving.timed import timed_protocols

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
JSON = "application/json"
HEAD_BYTES = 64 * 1024  # of a request, at most
KEEP_ALIVE = 75  # s between two requests of one connection


async def act(request: HttpRequest) -> Response:
    """POST /act, of OpenVLA and OpenVLA-OFT."""
    service: Service = request.app.state.service
    client = f"{request.client.host}:{request.client.port}" if request.client else "?"
    try:
        async with service.request(OPENVLA, client) as query:
            asked = await service.in_thread(ActRequest, await read_body(request, service.limits), service.limits)
            query.dialect = asked.dialect
            stream = None if asked.session is None else ("session", asked.session)
            chunk = await query.ask(asked.observation, stream)
            return Response(asked.answer(chunk, plain=request.headers.get("accept") == JSON), media_type=JSON)
    except RequestError as error:
        return refusal(error)
    except ConnectionResetError:  # in the middle of its body: nobody reads this
        return Response(status_code=400)


async def read_body(request: HttpRequest, limits: Limits) -> bytes:
    """The raw body, whatever Content-Type says. RequestError when it is too long or too slow."""
    parts, size = [], 0
    declared = request.headers.get("content-length", "0")
    try:
        async with asyncio.timeout(limits.read_seconds):
            if declared.isdecimal() and int(declared[:20]) > limits.body:
                raise RequestError(f"the body has {declared[:20]} bytes, of at most {limits.body:,}", 413)
            async for part in request.stream():
                size += len(part)
                if size > limits.body:
                    raise RequestError(f"the body has more than {limits.body:,} bytes", 413)
                parts.append(part)
    except TimeoutError:
        raise RequestError(f"the body took more than {limits.read_seconds:g} s to arrive", 408) from None
    except ClientDisconnect:
        raise ConnectionResetError from None
    return b"".join(parts)


def refusal(error: RequestError) -> Response:
    """One sentence as JSON. Of a body that was not read to its end nothing more is wanted."""
    headers = {"Retry-After": str(Busy.retry_after)} if error.status == 503 else {}
    if error.status in (408, 413):
        headers["Connection"] = "close"
    return JSONResponse({"error": str(error)}, error.status, headers)


async def greet(socket: WebSocket) -> None:
    """WebSocket at /: openpi's client waits for a greeting, vla-eval's takes the first message for the answer to its HELLO: one map is both."""
    await socket.accept()
    service: Service = socket.app.state.service
    connection = Connection(socket, service)
    sockets = service.metrics.connections
    with sockets.track_inprogress(), contextlib.suppress(ConnectionResetError):
        await connection.send(write_msgpack({**openpi.metadata(service), **vla_eval.hello(service)}, bytes_keys))

        def choose(message: Any) -> Dialect:
            return vla_eval.VlaEval(connection, greeted=True) if vla_eval.is_message(message) else pi

        pi = openpi.Openpi(connection)
        await converse(connection, pi, choose)


async def harness(socket: WebSocket) -> None:
    """WebSocket at /vla-eval."""
    await socket.accept()
    connection = Connection(socket, socket.app.state.service)
    with connection.service.metrics.connections.track_inprogress(), contextlib.suppress(ConnectionResetError):
        await converse(connection, vla_eval.VlaEval(connection, greeted=False))


async def page(request: HttpRequest) -> Response:
    """A page to try the policy with; no other resource is loaded."""
    headers = {"Content-Security-Policy": PAGE_POLICY, "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
    return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)


async def healthz(request: HttpRequest) -> Response:
    """200 OK while requests are answered, 503 before warm-up ends and while the server stops."""
    service: Service = request.app.state.service
    return PlainTextResponse("OK") if service.ready and not service.draining else PlainTextResponse("not ready", 503)


async def health(request: HttpRequest) -> Response:
    """The same as vla-eval asks it."""
    answer = await healthz(request)
    return JSONResponse({"status": "ok" if answer.status_code == 200 else "not ready"}, answer.status_code)


async def metadata(request: HttpRequest) -> Response:
    """What the policy is, and what the server takes."""
    service: Service = request.app.state.service
    return JSONResponse(service.describe())


async def config(request: HttpRequest) -> Response:
    """The batching limits, as vla-eval asks them. They can't be changed from outside."""
    queue = request.app.state.service.queue
    return JSONResponse({"config": {"max_batch_size": queue.max_batch, "max_wait_time": queue.max_wait}})


async def metrics(request: HttpRequest) -> Response:
    return PlainTextResponse(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


async def example(request: HttpRequest) -> Response:
    """A request that /act answers, with grey images."""
    return Response(write_request(request.app.state.service.example()), media_type=JSON)


def build_app(service: Service, key: str | None) -> Guard:
    """The ASGI application. key None: no API key is asked for."""
    routes = [
        Route("/act", act, methods=["POST"]),
        WebSocketRoute("/", greet),
        WebSocketRoute(vla_eval.PATH, harness),
        *(
            Route(path, answer, methods=["GET"])
            for path, answer in (
                ("/", page),
                ("/healthz", healthz),
                ("/health", health),
                ("/metadata", metadata),
                ("/config", config),
                ("/metrics", metrics),
                ("/example", example),
            )
        ),
    ]
    app = Starlette(routes=routes)
    app.state.service = service
    return Guard(app, key)


class Server(uvicorn.Server):
    """Finishes what is under way before it closes connections."""

    def __init__(self, service: Service, key: str | None, *, stop_seconds: float = 30.0) -> None:
        """stop_seconds: how long a stop may take."""
        limits = service.limits
        http, sockets = timed_protocols(limits.connections, limits.read_seconds)
        super().__init__(
            uvicorn.Config(
                build_app(service, key),
                loop="asyncio",
                http=http,
                ws=sockets,
                lifespan="off",
                ws_max_size=limits.body,
                ws_per_message_deflate=False,
                ws_ping_interval=None,  # a harness that builds its simulator answers no ping for minutes; TCP's keep-alive does
                h11_max_incomplete_event_size=HEAD_BYTES,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(stop_seconds),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
            )
        )
        self.service, self._stop_seconds = service, stop_seconds

    async def shutdown(self, sockets: Any = None) -> None:
        for server in self.servers:
            server.close()
        await self.service.drain(self._stop_seconds)
        await super().shutdown(sockets)
