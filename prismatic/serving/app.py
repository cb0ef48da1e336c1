"""Which path is answered by what. In: a Service and an API key. Out: an ASGI application, and a uvicorn server for it."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute

from prismatic.errors import ConfigError
from prismatic.serving.connection import converse
from prismatic.serving.guard import Guard
from prismatic.serving.openvla import JSON, act, write_request
from prismatic.serving.service import Service, WarmUp
from prismatic.serving.timed import timed_protocols

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
KEEP_ALIVE = 75  # s between two requests of one connection


async def page(request: Request) -> Response:
    """A page to try the policy with; no other resource is loaded."""
    return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)


async def healthz(request: Request) -> Response:
    """200 OK while requests are answered, 503 before warm-up ends and while the server stops; openpi asks it so."""
    service: Service = request.app.state.service
    return PlainTextResponse("OK") if service.ready and not service.draining else PlainTextResponse("not ready", 503)


async def health(request: Request) -> Response:
    """The same as vla-eval asks it."""
    answer = await healthz(request)
    return JSONResponse({"status": "ok" if answer.status_code == 200 else "not ready"}, answer.status_code)


async def metadata(request: Request) -> Response:
    """What the policy is, and what the server takes."""
    return JSONResponse(request.app.state.service.describe())


async def metrics(request: Request) -> Response:
    """Prometheus' text."""
    return PlainTextResponse(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


async def example(request: Request) -> Response:
    """A request that /act answers in full, with grey images: OpenVLA-OFT's where the policy answers with chunks."""
    service: Service = request.app.state.service
    frame = "image" if service.policy.num_actions_chunk == 1 else "full_image"
    return Response(write_request(service.example(), frame=frame), media_type=JSON)


def build_app(service: Service, key: str | None) -> Guard:
    """The ASGI application. key None: no API key is asked for."""
    pages = {"": page} | {answer.__name__: answer for answer in (healthz, health, metadata, metrics, example)}
    app = Starlette(
        routes=[
            Route("/act", act, methods=["POST"]),
            *(WebSocketRoute(path, converse) for path in ("/", "/vla-eval")),
            *(Route(f"/{name}", answer) for name, answer in pages.items()),
        ]
    )
    app.state.service = service
    return Guard(app, key)


class Server(uvicorn.Server):
    """Finishes what is under way before it closes connections. stop_seconds: how long that may take."""

    def __init__(self, service: Service, key: str | None, *, stop_seconds: float = 30.0) -> None:
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
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(stop_seconds),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
            )
        )
        self.service, self._stop_seconds = service, stop_seconds

    async def run_until_stopped(self, listener: socket.socket, on_ready: Callable[[WarmUp], None]) -> None:
        """Listen, warm up, then answer until a signal comes. on_ready: is told how the warm-up went."""

        async def work() -> None:
            try:
                on_ready(await self.service.warm_up())
                await self.service.queue.run()
            finally:
                self.should_exit = True

        worker = asyncio.create_task(work())
        await self.serve([listener])
        if worker.done():
            worker.result()  # raises what stopped it
        worker.cancel()

    async def startup(self, sockets: Any = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another one was bound to it at the same time, and listens already
            raise ConfigError(f"can't listen ({error.strerror}): give another --port") from None

    async def shutdown(self, sockets: Any = None) -> None:
        for server in self.servers:
            server.close()
        await self.service.drain(self._stop_seconds)
        await super().shutdown(sockets)
