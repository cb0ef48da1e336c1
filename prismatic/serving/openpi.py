"""openpi's WebSocket dialect (π0): the server greets with a map of metadata, then each observation is answered with a chunk.

In: msgpack with bytes-keyed arrays, `observation/image`, `observation/wrist_image`, `observation/state`, `prompt`; images upright. Out:
`actions` (K, D), gripper -1 open … +1 close, not binarised. Surprising: an error is a *text* frame, then close code 1011.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from prismatic.serving.codec import bytes_keys, write_msgpack
from prismatic.serving.observation import Limits, Observation, RequestError, read_observation
from prismatic.serving.service import Service


def metadata(service: Service) -> dict[str, Any]:
    """What the greeting says. A client that executes n actions of each answer needs num_actions_chunk ≥ n."""
    return {**service.metadata, "num_actions_chunk": service.policy.num_actions_chunk}


class Openpi:
    """Answers one connection."""

    name = "openpi"
    close_code: int | None = 1011

    def __init__(self, client: str) -> None:
        self._client = client

    def read(self, message: Any, limits: Limits) -> Observation:
        if not isinstance(message, dict):
            raise RequestError("an observation must be a map")
        names = {name: f"observation/{name}" for name in ("image", "wrist_image", "state")}
        return read_observation(message, limits, stream=self._client, names=names | {"instruction": "prompt"})

    def write(self, chunk: np.ndarray | None, timing: Mapping[str, float]) -> bytes:
        return write_msgpack({"actions": chunk, "server_timing": timing}, bytes_keys)

    def refusal(self, error: RequestError) -> str:
        return str(error)
