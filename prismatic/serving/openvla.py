"""OpenVLA's and OpenVLA-OFT's `POST /act`: one path, told apart by the keys.

OpenVLA: {image, instruction[, unnorm_key]} → an array of 7. OpenVLA-OFT: {full_image, …wrist…, state, instruction} → a list of K arrays of 7.
Gripper 1 open … 0 close, not binarised; images upright. Surprising: a body {"encoded": "<the request as JSON>"} is answered with a JSON string.
A `session` (text) names the robot, so that its last action drafts the next. `Accept: application/json` gets plain lists of numbers.
"""

import json

import numpy as np

from prismatic.serving.codec import json_array, read_json
from prismatic.serving.observation import Limits, Observation, RequestError, read_observation

OPENVLA, OFT = "openvla", "openvla-oft"
LONGEST_SESSION = 128  # characters


class ActRequest:
    """A parsed body: `dialect`, `observation`, `session` (None: unnamed), and how to write the answer to it."""

    def __init__(self, body: bytes, limits: Limits) -> None:
        """RequestError for a body that is no request."""
        message = read_json(body, limits)
        self.encoded = isinstance(message, dict) and message.keys() == {"encoded"}
        if self.encoded:
            if not isinstance(message["encoded"], str):
                raise RequestError("encoded must be the request as a JSON string")
            message = read_json(message["encoded"].encode(errors="replace"), limits)
        if not isinstance(message, dict):
            raise RequestError("the body must be a JSON object with image (or full_image) and instruction")
        self.session = message.get("session")
        if self.session is not None and not (isinstance(self.session, str) and len(self.session) <= LONGEST_SESSION):
            raise RequestError(f"session must be text of at most {LONGEST_SESSION} characters")
        self.dialect = OFT if "full_image" in message else OPENVLA
        wrists = [name for name in message if "wrist" in name]
        if len(wrists) > 1:
            raise RequestError(f"{' and '.join(sorted(wrists))[:80]}: a policy here looks at one wrist image")
        frame = "full_image" if self.dialect == OFT else "image"
        self.observation = read_observation(message, limits, frame=frame, wrist=(wrists or ["wrist_image"])[0])

    def answer(self, chunk: np.ndarray, *, plain: bool) -> bytes:
        """chunk (K, 7) → the body of the response. plain: lists of numbers, not json-numpy."""
        rows = [row.tolist() if plain else json_array(row) for row in chunk.astype(np.float64)]
        text = json.dumps(rows if self.dialect == OFT else rows[0])
        return (json.dumps(text) if self.encoded else text).encode()


def write_request(observation: Observation) -> bytes:
    """A body of OpenVLA's dialect, for trying a server out."""
    arrays = {"image": observation.frame, "wrist_image": observation.wrist, "state": observation.state}
    fields = {name: json_array(array) for name, array in arrays.items() if array is not None}
    return json.dumps(fields | {"instruction": observation.instruction}).encode()
