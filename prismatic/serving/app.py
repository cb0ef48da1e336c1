"""Which path is answered by what. In: a Service and an API key. Out: an ASGI application, and a uvicorn server for it."""

from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute

from prismatic.serving.connection import converse
from prismatic.serving.guard import Guard
from prismatic.serving.openvla import JSON, act, write_request
from prismatic.serving.service import Service
from prismatic.serving.timed import timed_protocols

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
HEAD_BYTES = 64 * 1024  # of a request, at most
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
    """A request that /act answers, with grey images."""
    return Response(write_request(request.app.state.service.example()), media_type=JSON)


def build_app(service: Service, key: str | None) -> Guard:
    """The ASGI application. key None: no API key is asked for."""
    pages = (page, healthz, health, metadata, metrics, example)
    app = Starlette(
        routes=[
            Route("/act", act, methods=["POST"]),
            *(WebSocketRoute(path, converse) for path in ("/", "/vla-eval")),
            *(Route("/" if answer is page else f"/{answer.__name__}", answer, methods=["GET"]) for answer in pages),
        ]
    )
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
