"""openpi's WebSocket dialect (π0): the server greets with a map of metadata, then each observation is answered with a chunk.

In: msgpack with bytes-keyed arrays, `observation/image`, `observation/wrist_image`, `observation/state`, `prompt`; images upright. Out:
`actions` (K, 7), gripper -1 open … +1 close, not binarised. Surprising: an error is a *text* frame, then close code 1011.
"""

from typing import Any

import numpy as np

from prismatic.serving.codec import bytes_keys, write_msgpack
from prismatic.serving.connection import Connection
from prismatic.serving.observation import RequestError, read_observation
from prismatic.serving.service import Request, Service

NAMES = {
    "frame": "observation/image",
    "wrist": "observation/wrist_image",
    "state": "observation/state",
    "instruction": "prompt",
}
INTERNAL_ERROR = 1011  # close code
ACTION_DIM = 7  # numbers of an action, the gripper last


def metadata(service: Service) -> dict[str, Any]:
    """What the greeting says. A client that executes n actions of each answer needs num_actions_chunk ≥ n."""
    return {**service.metadata, "num_actions_chunk": service.policy.num_actions_chunk, "action_dim": ACTION_DIM}


def close_positive(chunk: np.ndarray) -> np.ndarray:
    """(..., 7), gripper 1 open … 0 close → -1 open … +1 close, as the simulator's own actions are. RequestError for another width."""
    if chunk.shape[-1] != ACTION_DIM:  # of two arms: which numbers are grippers is not known here
        raise RequestError(
            f"this policy's actions have {chunk.shape[-1]} numbers, here they are {ACTION_DIM}: ask POST /act", 501
        )
    return np.concatenate([chunk[..., :6], 1 - 2 * chunk[..., 6:]], axis=-1)


class Openpi:
    """Answers one connection."""

    name = "openpi"

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def reply(self, request: Request, message: Any) -> None:
        if not isinstance(message, dict):
            raise RequestError("an observation must be a map")
        observation = read_observation(message, self.connection.service.limits, **NAMES)
        chunk = await request.ask(observation, self.connection.stream)
        content = {"actions": close_positive(chunk), "server_timing": request.timing()}
        await self.connection.send(write_msgpack(content, bytes_keys))

    async def refuse(self, error: RequestError) -> None:
        await self.connection.send(str(error))
        await self.connection.close(INTERNAL_ERROR)
