"""vla-eval's WebSocket dialect: maps {type, payload, seq, timestamp}; each OBSERVATION is answered with one ACTION of the same seq.

In: string-keyed arrays or PNG; `images{agentview[, wrist]}` upright, `task_description`, `states`. Out: `actions` (7,), gripper -1 open … +1 close.
Surprising: one action an answer, so the rest of a chunk is kept here, for this connection and episode; an error leaves the connection open.
"""

import time
from collections import deque
from typing import Any

import numpy as np

from prismatic.serving.codec import string_keys, write_msgpack
from prismatic.serving.connection import Connection
from prismatic.serving.observation import Limits, Observation, RequestError, read_observation
from prismatic.serving.openpi import close_positive
from prismatic.serving.service import Request, Service

PROTOCOL_VERSION = 1
PATH = "/vla-eval"
# What an action and an observation mean, in the harness's words: it warns where its benchmark means something else.
ACTION_SPEC = {
    "position": {"name": "position", "dims": 3, "format": "delta_xyz", "range": [-1, 1]},
    "rotation": {"name": "rotation", "dims": 3, "format": "axis_angle", "range": [-3.15, 3.15]},
    "gripper": {"name": "gripper", "dims": 1, "format": "binary_close_positive", "range": [-1, 1]},
}
IMAGE_SPEC = {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"}
LANGUAGE_SPEC = {"name": "language", "dims": 0, "format": "language"}
STATE_SPEC = {"name": "state", "dims": 8, "format": "eef_pos3_axisangle3_gripper2"}


def hello(service: Service, seq: int = 0) -> dict[str, Any]:
    """The server's HELLO: what it is, and what the benchmark should send (env_seed 0 as in published numbers)."""
    two, state = service.policy.num_images > 1, service.policy.uses_state
    payload = {
        "harness_version": "",
        "protocol_version": PROTOCOL_VERSION,
        "model_server": "openvla",
        "capabilities": {},
        "observation_params": {
            "env_seed": 0,
            **({"send_wrist_image": True} if two else {}),
            **({"send_state": True, "quat_no_antipodal": True} if state else {}),
        },
        "action_spec": ACTION_SPEC,
        "observation_spec": {
            "agentview": IMAGE_SPEC,
            "language": LANGUAGE_SPEC,
            **({"wrist": IMAGE_SPEC} if two else {}),
            **({"state": STATE_SPEC} if state else {}),
        },
    }
    return envelope("hello", payload, seq)


def envelope(kind: str, payload: dict[str, Any], seq: Any) -> dict[str, Any]:
    return {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}


def is_message(message: Any) -> bool:
    """Whether a decoded message is of this dialect."""
    return isinstance(message, dict) and "type" in message and isinstance(message.get("payload"), dict)


def read(payload: dict[str, Any], limits: Limits) -> Observation:
    """An observation from a decoded payload: the camera named agentview, or the first that is not on the wrist."""
    images = payload.get("images")
    if not isinstance(images, dict):
        raise RequestError("images must be a map of cameras' names to images")
    wrists = [name for name in images if "wrist" in str(name)]
    fronts = [name for name in images if name not in wrists]
    front = "agentview" if "agentview" in images else next(iter(fronts), "agentview")
    fields = {
        "images.agentview": images.get(front),
        "images.wrist": images[wrists[0]] if wrists else None,
        "task_description": payload.get("task_description"),
        "states": payload.get("states", payload.get("state")),
    }
    names = dict(zip(("frame", "wrist", "instruction", "state"), fields, strict=True))
    return read_observation(fields, limits, **names)


class VlaEval:
    """Answers one connection. The rest of a chunk belongs to one of its episodes, and so does the draft."""

    name = "vla-eval"

    def __init__(self, connection: Connection, *, greeted: bool) -> None:
        """greeted: the client's HELLO is answered before it comes."""
        self.connection, self._greeted = connection, greeted
        self._rest: deque[np.ndarray] = deque()
        self._episode = self._seq = 0

    async def reply(self, request: Request, message: Any) -> None:
        if not is_message(message):
            raise RequestError("a message must be a map with type, payload, seq and timestamp")
        kind, payload = message["type"], message["payload"]
        self._seq = message.get("seq") if isinstance(message.get("seq"), int) else 0
        request.facts["type"] = str(kind)[:20]
        if kind == "hello":
            if not self._greeted:
                await self._send(hello(self.connection.service, self._seq))
            self._greeted = False
        elif kind in ("episode_start", "episode_end"):
            self._rest.clear()
            self._episode += kind == "episode_start"
        elif kind == "observation":
            observation = read(payload, self.connection.service.limits)
            if not self._rest:
                chunk = await request.ask(observation, (self.connection.stream, self._episode))
                self._rest.extend(close_positive(chunk))
            await self._send(envelope("action", {"actions": self._rest.popleft()}, self._seq))
        elif kind != "error":
            raise RequestError("type must be hello, observation, episode_start, episode_end or error")

    async def refuse(self, error: RequestError) -> None:
        await self._send(envelope("error", {"error": str(error)}, self._seq))

    async def _send(self, message: dict[str, Any]) -> None:
        await self.connection.send(write_msgpack(message, string_keys))
