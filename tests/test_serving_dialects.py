"""Each dialect as its own client speaks it: the clients are the published packages, unchanged."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import json_numpy
import numpy as np
import pytest
import requests
from inspect_robots.scene import Scene
from inspect_robots.types import Observation
from inspect_robots_widowx.policy import OpenVLAPolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from vla_eval.connection import Connection
from vla_eval.protocol.numpy_codec import get_image_format, set_image_format
from vla_eval.specs import GRIPPER_CLOSE_POS, DimSpec, check_specs

from prismatic.serving.observation import RequestError
from prismatic.serving.openpi import close_positive
from tests.fake_policy import FakePolicy, picture
from tests.live_server import Live, live

WORDS = "pick up the bowl"
FRAME, WRIST, STATE = picture(1), picture(2), np.linspace(-1, 1, 8)
CHUNK = 5


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    """A policy that wants all there is, and answers chunks."""
    with live(FakePolicy(num_actions_chunk=CHUNK, uses_state=True)) as server:
        yield server


@pytest.fixture(scope="module")
def small() -> Iterator[Live]:
    """One image, one action: OpenVLA's own kind."""
    with live(FakePolicy(num_images=1)) as server:
        yield server


def expected(server: Live, *, close_positive: bool = False) -> np.ndarray:
    policy = server.service.policy
    assert isinstance(policy, FakePolicy)
    chunk = policy.answer(FRAME, WORDS, WRIST, STATE if policy.uses_state else None)
    if close_positive:
        chunk[:, 6] = -0.5  # 0.75 on the scale 1 open … 0 close is -0.5 on -1 open … +1 close
    return chunk


def post(server: Live, **fields: Any) -> requests.Response:
    """As OpenVLA's clients do, without a Content-Type."""
    return requests.post(server.url + "/act", data=json_numpy.dumps(fields), timeout=10)


def test_openvla_act_answers_an_array_of_seven(small: Live) -> None:
    answer = json_numpy.loads(post(small, image=FRAME, instruction=WORDS, unnorm_key="libero_spatial").text)
    assert isinstance(answer, np.ndarray) and answer.shape == (7,) and answer.dtype == np.float64
    np.testing.assert_array_equal(answer, expected(small)[0])


def test_openvla_act_answers_a_request_in_a_string_with_a_string(small: Live) -> None:
    body = {"encoded": json_numpy.dumps({"image": FRAME, "instruction": WORDS})}
    text = requests.post(small.url + "/act", json=body, timeout=10).json()
    assert isinstance(text, str)
    np.testing.assert_array_equal(json_numpy.loads(text), expected(small)[0])


def test_plain_numbers_where_the_client_accepts_json(small: Live) -> None:
    body, headers = json_numpy.dumps({"image": FRAME, "instruction": WORDS}), {"Accept": "application/json"}
    answer = requests.post(small.url + "/act", data=body, headers=headers, timeout=10).json()
    np.testing.assert_allclose(answer, expected(small)[0])


def test_openvla_oft_act_answers_a_list_of_arrays(served: Live) -> None:
    response = post(served, full_image=FRAME, left_wrist_image=WRIST, state=STATE, instruction=WORDS)
    answer = json_numpy.loads(response.text)
    assert isinstance(answer, list) and len(answer) == CHUNK
    np.testing.assert_array_equal(answer, expected(served))


def test_inspect_robots_widowx(small: Live) -> None:
    policy = OpenVLAPolicy(server_url=small.url, unnorm_key="libero_spatial", jpeg_roundtrip=False, resize_px=32)
    policy.reset(Scene(id="scene", instruction=WORDS))
    chunk = policy.act(Observation(images={"external_cam": FRAME}, state={}))
    np.testing.assert_array_equal(chunk.actions[0].data, expected(small)[0])


def test_openpi_gets_chunks_with_the_simulators_gripper(served: Live) -> None:
    client = WebsocketClientPolicy("127.0.0.1", served.port)
    assert client.get_server_metadata()["num_actions_chunk"] == CHUNK
    observation = {
        "observation/image": FRAME,
        "observation/wrist_image": WRIST,
        "observation/state": STATE,
        "prompt": WORDS,
    }
    answer = client.infer(observation)
    np.testing.assert_allclose(answer["actions"], expected(served, close_positive=True), rtol=1e-6)
    assert answer["actions"].shape == (CHUNK, 7) and answer["server_timing"]["infer_ms"] >= 0
    with pytest.raises(RuntimeError, match="prompt must be a sentence"):
        client.infer(observation | {"prompt": ""})
    with pytest.raises(Exception, match="1011"):
        client.infer(observation)


def test_no_gripper_is_guessed_in_another_width() -> None:
    with pytest.raises(RequestError, match="14 numbers"):
        close_positive(np.zeros((2, 14), np.float32))


def vla_eval(server: Live, path: str, episodes: list[int], **observation: Any) -> tuple[list[np.ndarray], dict]:
    """The actions of episodes of so many steps, and what the server's HELLO says."""
    actions = []

    async def play() -> dict:
        async with Connection(f"ws://127.0.0.1:{server.port}{path}", max_retries=1) as connection:
            for steps in episodes:
                await connection.start_episode({"task": {"name": WORDS}})
                for _ in range(steps):
                    actions.append((await connection.act(observation))["actions"])
                await connection.end_episode({"success": True})
            return connection.server_info

    return actions, asyncio.run(play())


@pytest.mark.parametrize("path", ["", "/", "/vla-eval"])
def test_vla_eval_gets_one_action_an_observation_and_no_rest_of_another_episode(served: Live, path: str) -> None:
    policy = served.service.policy
    assert isinstance(policy, FakePolicy)
    policy.streams.clear()
    observation = {"images": {"agentview": FRAME, "wrist": WRIST}, "task_description": WORDS, "states": STATE}
    actions, info = vla_eval(served, path, [CHUNK + 2, 1], **observation)
    chunk = expected(served, close_positive=True)
    np.testing.assert_allclose(actions, [*chunk, *chunk[:2], chunk[0]], rtol=1e-6)
    first, second, third = policy.streams  # two questions in the first episode
    assert first == second != third
    assert info["observation_params"] == {
        "env_seed": 0, "send_wrist_image": True, "send_state": True, "quat_no_antipodal": True,
    }  # fmt: skip


def test_vla_eval_finds_its_own_specs(served: Live) -> None:
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark

    _, info = vla_eval(served, "", [])
    benchmark = LIBEROBenchmark(suite="libero_spatial", send_wrist_image=True, send_state=True)
    action, observation = (
        {name: DimSpec.from_dict(spec) for name, spec in info[kind].items()}
        for kind in ("action_spec", "observation_spec")
    )
    assert action["gripper"] == GRIPPER_CLOSE_POS
    assert check_specs(action, benchmark.get_action_spec(), observation, benchmark.get_observation_spec()) == []


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg"])
def test_vla_evals_image_formats(served: Live, image_format: Any) -> None:
    before = get_image_format()
    set_image_format(image_format)
    try:
        observation = {"images": {"agentview": FRAME, "wrist": WRIST}, "task_description": WORDS, "states": STATE}
        actions, _ = vla_eval(served, "", [1], **observation)
    finally:
        set_image_format(before)
    same = np.allclose(actions[0], expected(served, close_positive=True)[0])
    assert same == (image_format != "jpeg")  # JPEG is lossy


def test_vla_eval_survives_an_error(served: Live) -> None:
    async def play() -> np.ndarray:
        async with Connection(f"ws://127.0.0.1:{served.port}", max_retries=1) as connection:
            with pytest.raises(RuntimeError, match=r"images\.agentview is missing"):
                await connection.act({"images": {}, "task_description": WORDS})
            whole = {"images": {"agentview": FRAME, "wrist": WRIST}, "task_description": WORDS, "states": STATE}
            return (await connection.act(whole))["actions"]

    np.testing.assert_allclose(asyncio.run(play()), expected(served, close_positive=True)[0], rtol=1e-6)


def test_a_session_names_the_stream(small: Live) -> None:
    policy = small.service.policy
    assert isinstance(policy, FakePolicy)
    policy.streams.clear()
    for session in ("robot 1", "robot 2", "robot 1", None):
        assert post(small, image=FRAME, instruction=WORDS, session=session).status_code == 200
    first, second, third, unnamed = policy.streams
    assert first == third != second and unnamed is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"wrist_image": None}, "two images"),
        ({"state": None}, "state"),
        ({"state": [1.0] * 7}, "8 numbers"),
        ({"state": [float("nan")] * 8}, "NaN"),
        ({"state": ["1"] * 8}, "list"),
        ({"state": np.array(1.0)}, "list"),
        ({"state": [1e300] * 8}, "float32"),
        ({"image": FRAME.astype(np.float32)}, "uint8"),
        ({"image": FRAME[..., :1]}, "uint8"),
        ({"image": FRAME[:4]}, "pixels"),
        ({"image": "picture"}, "uint8"),
        ({"image": None}, "image is missing"),
        ({"instruction": " "}, "sentence"),
        ({"instruction": 7}, "sentence"),
        ({"instruction": "\ud800"}, "Unicode"),
        ({"unnorm_key": "bridge_orig"}, "libero_spatial_no_noops"),
        ({"unnorm_key": 3}, "unnorm_key"),
        ({"session": 3}, "session"),
    ],
)
def test_a_wrong_field_is_named_in_one_sentence(served: Live, change: dict, sentence: str) -> None:
    fields = {"image": FRAME, "wrist_image": WRIST, "state": STATE, "instruction": WORDS} | change
    response = post(served, **fields)
    assert response.status_code == 400 and response.json().keys() == {"error"}
    assert sentence in response.json()["error"] and "\n" not in response.json()["error"]


def test_the_example_is_answered(served: Live) -> None:
    example = requests.get(served.url + "/example", timeout=10)
    answer = requests.post(
        served.url + "/act", data=example.content, headers={"Accept": "application/json"}, timeout=10
    )
    assert answer.status_code == 200 and len(json.loads(answer.text)) == 7
