"""Who may ask: the API key, and without one only this machine's own programs, not the web pages that its browser shows.

An ASGI middleware in front of everything, WebSockets before they are accepted. The page itself, /healthz and /health need no key: they say nothing.
"""

import hmac
import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from prismatic.errors import ConfigError
from prismatic.records import read_bytes

KEY_VARIABLE = "OPENVLA_API_KEY"
SHORTEST_KEY = 16  # characters
OPEN = ("/", "/healthz", "/health")  # paths that need no key, for HTTP


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_key(file: Path | None, host: str) -> str | None:
    """The API key of a file, else of the environment; None where there is none and host needs none. ConfigError otherwise."""
    key = os.environ.get(KEY_VARIABLE, "")
    if file:
        key = read_bytes(file, largest=4096, way_out="give a text file with the key").decode(errors="replace")
    key = key.strip()
    source = f"--api_key_file {file}" if file else KEY_VARIABLE
    if (file or key) and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable()):
        raise ConfigError(
            f"{source} must hold {SHORTEST_KEY} or more ASCII characters: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes a key"
        )
    if not key and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in: give --api_key_file FILE or set {KEY_VARIABLE}, or leave --host out"
        )
    return key or None


class Guard:
    """key None: clients of this machine only, asked by the names of this machine."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self._key = app, None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refused is None:
            await self.app(scope, receive, send)
            return
        status, sentence = refused
        headers = {"WWW-Authenticate": "Api-Key"} if status == 401 else {}
        response = JSONResponse({"error": sentence}, status, headers | {"Connection": "close"})
        if scope["type"] == "http":
            await response(scope, receive, send)
        else:
            await WebSocket(scope, receive, send).send_denial_response(response)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or "" if host.isprintable() else ""
            origin = urlsplit(headers["origin"]).netloc if "origin" in headers else host
        except ValueError:  # brackets that hold no address
            return 403, "the Host or the Origin of this request is no address"
        if self._key is None and host and not is_loopback(name):  # a foreign name that was made to point here
            return 403, "without an API key this server answers to localhost only"
        if origin != host:  # another site's page in a browser
            return 403, "a page of another site may not ask this server"
        if self._key is None or (scope["type"] == "http" and scope["path"] in OPEN):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() in ("api-key", "bearer") else headers.get("x-api-key", "")
        if hmac.compare_digest(given.strip().encode(), self._key):
            return None
        return 401, "an API key is needed: Authorization: Api-Key …"
