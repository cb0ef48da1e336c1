"""OpenVLA's and OpenVLA-OFT's `POST /act`: one path, told apart by the keys.

OpenVLA: {image, instruction[, unnorm_key]} → an array of D. OpenVLA-OFT: {full_image, …wrist…, state, instruction} → a list of K arrays of D.
Gripper 1 open … 0 close, not binarised; images upright. Surprising: a body {"encoded": "<the request as JSON>"} is answered with a JSON string.
A `session` (text) names the robot, so that its last action drafts the next. `Accept: application/json` gets plain lists of numbers.
"""

import asyncio
import json

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from prismatic.serving.codec import json_array, read_json
from prismatic.serving.observation import Limits, Observation, RequestError, read_observation
from prismatic.serving.service import Service

OPENVLA, OFT = "openvla", "openvla-oft"
JSON = "application/json"
LONGEST_SESSION = 128  # characters


async def act(request: HttpRequest) -> Response:
    """POST /act. An error is one sentence as JSON."""
    service: Service = request.app.state.service
    client = f"{request.client.host}:{request.client.port}" if request.client else "?"
    dialect = Act(plain=request.headers.get("accept") == JSON)
    try:
        async with service.request(dialect, client) as query:
            body = await read_body(request, service.limits)
            return Response(dialect.write(await query.ask(lambda: dialect.read(body, service.limits))), media_type=JSON)
    except RequestError as error:
        headers = {"Retry-After": "1"} if error.status == 503 else {}
        if error.status in (408, 413):  # of a body that was not read to its end nothing more is wanted
            headers["Connection"] = "close"
        return JSONResponse({"error": str(error)}, error.status, headers)
    except ConnectionResetError:  # in the middle of its body: nobody reads this
        return Response(status_code=400)


async def read_body(request: HttpRequest, limits: Limits) -> bytes:
    """The raw body, whatever Content-Type says. RequestError when it is too long or too slow."""
    body, declared = bytearray(), request.headers.get("content-length", "0")
    try:
        async with asyncio.timeout(limits.read_seconds):
            if declared.isdecimal() and int(declared[:20]) > limits.body:
                raise RequestError(f"the body has {declared[:20]} bytes, of at most {limits.body:,}", 413)
            async for part in request.stream():
                body += part
                if len(body) > limits.body:
                    raise RequestError(f"the body has more than {limits.body:,} bytes", 413)
    except TimeoutError:
        raise RequestError(f"the body took more than {limits.read_seconds:g} s to arrive", 408) from None
    except ClientDisconnect:
        raise ConnectionResetError from None
    return bytes(body)


def is_field(name: str) -> bool:
    """Whether a key means something here; clients send others too."""
    return (
        name in ("encoded", "image", "full_image", "instruction", "state", "unnorm_key", "session") or "wrist" in name
    )


class Act:
    """Reads a body, and writes the answer to it. plain: as lists of numbers, not json-numpy."""

    name = OPENVLA

    def __init__(self, *, plain: bool) -> None:
        self._plain, self._encoded = plain, False

    def read(self, body: bytes, limits: Limits) -> Observation:
        """RequestError for a body that is no request."""
        message = read_json(body, is_field)
        self._encoded = "encoded" in message
        if self._encoded:
            if not isinstance(message["encoded"], str):
                raise RequestError("encoded must be the request as a JSON string")
            message = read_json(message["encoded"].encode(), is_field)
        session = message.get("session")
        if session is not None and not (isinstance(session, str) and len(session) <= LONGEST_SESSION):
            raise RequestError(f"session must be text of at most {LONGEST_SESSION} characters")
        wrists = [name for name in message if "wrist" in name]
        if len(wrists) > 1:
            raise RequestError(f"{' and '.join(sorted(wrists))[:80]}: a policy here looks at one wrist image")
        self.name, image = (OFT, "full_image") if "full_image" in message else (OPENVLA, "image")
        names = {"image": image, "wrist_image": wrists[0] if wrists else "wrist_image"}
        return read_observation(message, limits, stream=session, names=names)

    def write(self, chunk: np.ndarray | None) -> bytes:
        """chunk (K, D) → the body of the response."""
        assert chunk is not None  # each body asks
        rows = [row.tolist() if self._plain else json_array(row) for row in chunk.astype(np.float64)]
        text = json.dumps(rows if self.name == OFT else rows[0])
        return (json.dumps(text) if self._encoded else text).encode()


def write_request(observation: Observation, *, frame: str = "image", **more: str) -> bytes:
    """A body of either dialect, for trying a server out. frame: the name that its image goes by; more: fields such as session."""
    arrays = {frame: observation.frame, "wrist_image": observation.wrist, "state": observation.state}
    fields = {name: json_array(array) for name, array in arrays.items() if array is not None}
    return json.dumps(fields | {"instruction": observation.instruction} | more).encode()
