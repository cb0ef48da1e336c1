"""OpenVLA's and OpenVLA-OFT's `POST /act`: one path, told apart by the keys.

OpenVLA: {image, instruction[, unnorm_key]} → an array of D. OpenVLA-OFT: {full_image, …wrist…, state, instruction} → a list of K arrays of D.
Gripper 1 open … 0 close, not binarised; images upright. Surprising: a body {"encoded": "<the request as JSON>"} is answered with a JSON string.
A `session` (text) names the robot, so that its last action drafts the next. `Accept: application/json` gets plain lists of numbers.
"""

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from prismatic.observation import Observation
from prismatic.serving.codec import json_array, read_json
from prismatic.serving.observation import Limits, RequestError, read_observation
from prismatic.serving.service import Service

OPENVLA, OFT = "openvla", "openvla-oft"
JSON = "application/json"
LONGEST_SESSION = 128  # characters


async def act(request: Request) -> Response:
    """POST /act. An error is one sentence as JSON."""
    service: Service = request.app.state.service
    try:
        async with service.request(OPENVLA, "{}:{}".format(*request.scope["client"])) as line:
            message, encoded = await service.in_reader(decode, await read_body(request, service.limits))
            many = "full_image" in message
            line["dialect"] = OFT if many else OPENVLA
            chunk = await while_connected(request, service.ask(read(message, service.limits), line))
            plain = request.headers.get("accept") == JSON
            rows = [row.tolist() if plain else json_array(row) for row in chunk.astype(np.float64)]
            text = json.dumps(rows if many else rows[0])
            return Response(json.dumps(text) if encoded else text, media_type=JSON)
    except RequestError as error:
        headers = {"Retry-After": "1"} if error.status == 503 else {}
        if error.status in (408, 413):  # of a body that was not read to its end nothing more is wanted
            headers["Connection"] = "close"
        return JSONResponse({"error": str(error)}, error.status, headers)
    except ConnectionResetError:  # nobody reads this
        return Response(status_code=400)


async def while_connected(request: Request, answer: Coroutine[Any, Any, np.ndarray]) -> np.ndarray:
    """The answer, unless its client hangs up first: nothing is computed for nobody. ConnectionResetError."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    asked, hung_up = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({asked, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise ConnectionResetError
        return asked.result()
    finally:
        asked.cancel()
        hung_up.cancel()


async def read_body(request: Request, limits: Limits) -> bytes:
    """The raw body, whatever Content-Type says. RequestError when it is too long or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body:
                    raise RequestError(f"the body has more than {limits.body:,} bytes", 413)
    except TimeoutError:
        raise RequestError(f"the body took more than {limits.read_seconds:g} s to arrive", 408) from None
    except ClientDisconnect:
        raise ConnectionResetError from None
    return bytes(body)


FIELDS = {"encoded", "image", "full_image", "instruction", "state", "unnorm_key", "session"}


def is_field(name: str) -> bool:
    """Whether a key means something here; clients send others too."""
    return name in FIELDS or "wrist" in name


def decode(body: bytes) -> tuple[dict[str, Any], bool]:
    """The fields of a body, and whether they came as a string. RequestError for a body that is no request."""
    message = read_json(body, is_field)
    if "encoded" not in message:
        return message, False
    if not isinstance(message["encoded"], str):
        raise RequestError("encoded must be the request as a JSON string")
    return read_json(message["encoded"].encode(), is_field), True


def read(message: Mapping[str, Any], limits: Limits) -> Observation:
    """What the policy is asked. RequestError for what it can't be."""
    session = message.get("session")
    if session is not None and not (isinstance(session, str) and len(session) <= LONGEST_SESSION):
        raise RequestError(f"session must be text of at most {LONGEST_SESSION} characters")
    wrists = sorted(name for name in message if "wrist" in name)
    if len(wrists) > 1:
        raise RequestError(f"{' and '.join(wrists)[:80]}: a policy here looks at one wrist image")
    image = "full_image" if "full_image" in message else "image"
    return read_observation(message, limits, image=image, wrist=wrists[0] if wrists else "", stream=session)


def write_request(observation: Observation, *, frame: str = "image", **more: str) -> bytes:
    """A body of either dialect, for trying a server out. frame: the name that its image goes by; more: fields such as session."""
    arrays = {frame: observation.frame, "wrist_image": observation.wrist, "state": observation.state}
    fields = {name: json_array(array) for name, array in arrays.items() if array is not None}
    return json.dumps(fields | {"instruction": observation.instruction} | more).encode()
