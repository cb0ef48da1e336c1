"""openpi's WebSocket dialect (π0): the server greets with a map of metadata, then each observation is answered with a chunk.

In: msgpack with bytes-keyed arrays, `observation/image`, `observation/wrist_image`, `observation/state`, `prompt`; images upright. Out:
`actions` (K, D), gripper -1 open … +1 close, not binarised. Surprising: an error is a *text* frame, then close code 1011.
A client that executes n actions of each answer needs a policy with num_actions_chunk ≥ n, which the greeting says.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from prismatic.observation import Observation
from prismatic.serving.codec import bytes_keys, write_msgpack
from prismatic.serving.observation import Limits, RequestError, read_observation

NAMES = {"image": "observation/image", "wrist": "observation/wrist_image", "state": "observation/state"}


class Openpi:
    """Answers one connection."""

    name = "openpi"
    close_code = 1011  # of the connection after a refusal

    def __init__(self, client: str) -> None:
        self._client = client

    def read(self, message: Any, limits: Limits) -> Observation:
        if not isinstance(message, dict):
            raise RequestError("an observation must be a map")
        return read_observation(message, limits, **NAMES, instruction="prompt", stream=self._client)

    def write(self, chunk: np.ndarray | None, line: Mapping[str, Any]) -> bytes:
        timing = {name: line[name] for name in ("queue_ms", "infer_ms")}
        return write_msgpack({"actions": chunk, "server_timing": timing}, bytes_keys)

    def refusal(self, error: RequestError) -> str:
        return str(error)
