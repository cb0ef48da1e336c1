"""vla-eval's WebSocket dialect: maps {type, payload, seq, timestamp}; each OBSERVATION is answered with one ACTION of the same seq.

In: string-keyed arrays or PNG; `images{agentview[, wrist]}` upright, `task_description`, `states`. Out: `actions` (7,), gripper -1 open … +1 close.
Surprising: one action an answer, so the rest of a chunk is kept here, for this connection and episode; an error leaves the connection open.
"""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from prismatic.observation import Observation
from prismatic.serving.codec import string_keys, write_msgpack
from prismatic.serving.observation import Limits, RequestError, read_observation
from prismatic.serving.service import Service

NAMES = {"image": "images.agentview", "wrist": "images.wrist", "instruction": "task_description", "state": "states"}
# What an action and an observation mean, in the harness's words: it warns where its benchmark means something else.
ACTION_SPEC = {
    "position": {"name": "position", "dims": 3, "format": "delta_xyz", "range": [-1, 1]},
    "rotation": {"name": "rotation", "dims": 3, "format": "axis_angle", "range": [-3.15, 3.15]},
    "gripper": {"name": "gripper", "dims": 1, "format": "binary_close_positive", "range": [-1, 1]},
}
IMAGE_SPEC = {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"}
LANGUAGE_SPEC = {"name": "language", "dims": 0, "format": "language"}
STATE_SPEC = {"name": "state", "dims": 8, "format": "eef_pos3_axisangle3_gripper2"}


def hello(service: Service) -> dict[str, Any]:
    """The server's HELLO: what it is, and what the benchmark should send (env_seed 0 as in published numbers)."""
    params: dict[str, Any] = {"env_seed": 0}
    spec = {"agentview": IMAGE_SPEC, "language": LANGUAGE_SPEC}
    if service.policy.num_images > 1:
        params["send_wrist_image"], spec["wrist"] = True, IMAGE_SPEC
    if service.policy.uses_state:
        params |= {"send_state": True, "quat_no_antipodal": True}
        spec["state"] = STATE_SPEC
    payload = {
        "harness_version": "",
        "protocol_version": 1,
        "model_server": "openvla",
        "capabilities": {},
        "observation_params": params,
        "action_spec": ACTION_SPEC,
        "observation_spec": spec,
    }
    return envelope("hello", payload, seq=0)


def envelope(kind: str, payload: dict[str, Any], seq: Any) -> dict[str, Any]:
    return {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}


def is_message(message: Any) -> bool:
    """Whether a decoded message is of this dialect."""
    return isinstance(message, dict) and "type" in message and isinstance(message.get("payload"), dict)


class VlaEval:
    """Answers one connection. The rest of a chunk belongs to one of its episodes, and so does the draft."""

    name = "vla-eval"
    close_code = None  # after a refusal it stays open

    def __init__(self, client: str) -> None:
        self._client = client
        self._rest: deque[np.ndarray] = deque()
        self._episode = self._seq = 0
        self._due = False  # whether an action is

    def read(self, message: Any, limits: Limits) -> Observation | None:
        """What the policy is asked by a decoded message, None for nothing. RequestError for one that can't be answered."""
        if not is_message(message):
            raise RequestError("a message must be a map with type, payload, seq and timestamp")
        kind, payload = message["type"], message["payload"]
        self._seq = message.get("seq") if isinstance(message.get("seq"), int) else 0
        self._due = kind == "observation"
        if self._due:
            images = payload.get("images")
            if not isinstance(images, dict):
                raise RequestError("images must be a map of cameras' names to images")
            fields = payload | {f"images.{name}": image for name, image in images.items()}
            observation = read_observation(fields, limits, **NAMES, stream=(self._client, self._episode))
            return None if self._rest else observation
        if kind in ("episode_start", "episode_end"):
            self._rest.clear()
            self._episode += kind == "episode_start"
        elif kind not in ("hello", "error"):  # the greeting has answered a hello
            raise RequestError("type must be hello, observation, episode_start, episode_end or error")
        return None

    def write(self, chunk: np.ndarray | None, line: Mapping[str, Any]) -> bytes | None:
        """The answer to the message last read, None where none is due. chunk: (K, D), gripper -1 open … +1 close; line: of the log."""
        self._rest.extend([] if chunk is None else chunk)
        return self._message("action", {"actions": self._rest.popleft()}) if self._due else None

    def refusal(self, error: RequestError) -> bytes:
        return self._message("error", {"error": str(error)})

    def _message(self, kind: str, payload: dict[str, Any]) -> bytes:
        return write_msgpack(envelope(kind, payload, self._seq), string_keys)
