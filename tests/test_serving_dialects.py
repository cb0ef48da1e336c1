"""Each dialect as its own client speaks it: the clients are the published packages, unchanged."""

import asyncio
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
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
from vla_eval.connection import Connection
from vla_eval.protocol.numpy_codec import get_image_format, set_image_format
from vla_eval.specs import GRIPPER_CLOSE_POS, DimSpec, check_specs

from prismatic.normalize import gripper_dims
from tests.fake_policy import FakePolicy, picture
from tests.live_server import Live, live

WORDS = "pick up the bowl"
FRAME, WRIST, STATE = picture(1), picture(2), np.linspace(-1, 1, 8)
PLAIN = {"image": FRAME, "instruction": WORDS}  # OpenVLA's own request
PAYLOAD = {"images": {"agentview": FRAME, "wrist": WRIST}, "task_description": WORDS, "states": STATE}  # vla-eval's
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


def policy_of(server: Live) -> FakePolicy:
    assert isinstance(server.service.policy, FakePolicy)
    return server.service.policy


def expected(server: Live, *, close_positive: bool = False) -> np.ndarray:
    policy = policy_of(server)
    chunk = policy.answer(FRAME, WORDS, WRIST, STATE if policy.uses_state else None)
    if close_positive:
        chunk[:, 6] = -0.5  # 0.75 on the scale 1 open … 0 close is -0.5 on -1 open … +1 close
    return chunk


def test_openvla_act_answers_an_array_of_seven(small: Live) -> None:
    answer = json_numpy.loads(small.act(json_numpy.dumps(PLAIN | {"unnorm_key": "libero_spatial"})).text)
    assert isinstance(answer, np.ndarray) and answer.shape == (7,) and answer.dtype == np.float64
    np.testing.assert_array_equal(answer, expected(small)[0])


def test_openvla_act_answers_a_request_in_a_string_with_a_string(small: Live) -> None:
    text = requests.post(small.url + "/act", json={"encoded": json_numpy.dumps(PLAIN)}, timeout=10).json()
    assert isinstance(text, str)
    np.testing.assert_array_equal(json_numpy.loads(text), expected(small)[0])


def test_plain_numbers_where_the_client_accepts_json_and_fields_of_no_meaning_are_passed_over(small: Live) -> None:
    asked = json_numpy.dumps(PLAIN | {"more": {"nested": [[1], None, True]}})
    np.testing.assert_allclose(small.act(asked, Accept="application/json").json(), expected(small)[0])


def test_openvla_oft_act_answers_a_list_of_arrays(served: Live) -> None:
    asked = {"full_image": FRAME, "left_wrist_image": WRIST, "state": STATE, "instruction": WORDS}
    answer = json_numpy.loads(served.act(json_numpy.dumps(asked)).text)
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
    images = {"observation/image": FRAME, "observation/wrist_image": WRIST}
    observation = images | {"observation/state": STATE, "prompt": WORDS}
    answer = client.infer(observation)
    np.testing.assert_allclose(answer["actions"], expected(served, close_positive=True), rtol=1e-6)
    assert answer["actions"].shape == (CHUNK, 7) and answer["server_timing"]["infer_ms"] >= 0
    with pytest.raises(RuntimeError, match="prompt must be a sentence"):
        client.infer(observation | {"prompt": ""})
    with pytest.raises(Exception, match="1011"):
        client.infer(observation)


@pytest.mark.parametrize("grippers", [[], [1, 4]])
def test_only_a_gripper_is_turned(small: Live, monkeypatch: pytest.MonkeyPatch, grippers: list[int]) -> None:
    """A policy that learnt with --gripper none has none; one of two arms has two."""
    monkeypatch.setitem(small.service.metadata, "gripper_dims", grippers)
    chunk = expected(small)
    chunk[:, grippers] = 1 - 2 * chunk[:, grippers]
    answer = WebsocketClientPolicy("127.0.0.1", small.port).infer({"observation/image": FRAME, "prompt": WORDS})
    np.testing.assert_allclose(answer["actions"], chunk)


def test_grippers_are_what_the_statistics_mask_leaves_unscaled() -> None:
    for scaled, grippers in [("1111110", [6]), ("1111111", []), ("11111101111110", [6, 13])]:
        statistics = {"q01": [0.0] * len(scaled)}
        assert gripper_dims(statistics | {"mask": [number == "1" for number in scaled]}) == grippers
        assert gripper_dims(statistics) == ([6] if len(scaled) == 7 else [])  # a foreign file without a mask


def vla_eval(server: Live, path: str, episodes: list[int]) -> tuple[list[np.ndarray], dict]:
    """The actions of episodes of so many steps, and what the server's HELLO says."""
    actions = []

    async def play() -> dict:
        async with Connection(f"ws://127.0.0.1:{server.port}{path}", max_retries=1) as connection:
            for steps in episodes:
                await connection.start_episode({"task": {"name": WORDS}})
                for _ in range(steps):
                    actions.append((await connection.act(PAYLOAD))["actions"])
                await connection.end_episode({"success": True})
            return connection.server_info

    return actions, asyncio.run(play())


@pytest.mark.parametrize("path", ["", "/vla-eval"])
def test_vla_eval_gets_one_action_an_observation_and_no_rest_of_another_episode(served: Live, path: str) -> None:
    policy_of(served).streams.clear()
    actions, info = vla_eval(served, path, [CHUNK + 2, 1])
    chunk = expected(served, close_positive=True)
    np.testing.assert_allclose(actions, [*chunk, *chunk[:2], chunk[0]], rtol=1e-6)
    first, second, third = policy_of(served).streams  # two questions in the first episode
    assert first == second != third
    assert info["observation_params"] == {
        "env_seed": 0, "send_wrist_image": True, "send_state": True, "quat_no_antipodal": True,
    }  # fmt: skip
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
        actions, _ = vla_eval(served, "", [1])
    finally:
        set_image_format(before)
    same = np.allclose(actions[0], expected(served, close_positive=True)[0])
    assert same == (image_format != "jpeg")  # JPEG is lossy


def test_vla_eval_survives_an_error(served: Live) -> None:
    async def play() -> np.ndarray:
        async with Connection(f"ws://127.0.0.1:{served.port}", max_retries=1) as connection:
            with pytest.raises(RuntimeError, match=r"images\.agentview is missing"):
                await connection.act({"images": {}, "task_description": WORDS})
            return (await connection.act(PAYLOAD))["actions"]

    np.testing.assert_allclose(asyncio.run(play()), expected(served, close_positive=True)[0], rtol=1e-6)


def test_a_session_names_the_stream(small: Live) -> None:
    policy_of(small).streams.clear()
    for session in ("robot 1", "robot 2", "robot 1", None):
        assert small.act(json_numpy.dumps(PLAIN | {"session": session})).status_code == 200
    first, second, third, unnamed = policy_of(small).streams
    assert first == third != second and unnamed is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"wrist_image": None}, "two images"),
        ({"other_wrist": WRIST}, "one wrist image"),
        ({"state": None}, "state"),
        ({"state": [1.0] * 7}, "8 numbers"),
        ({"state": np.full(8, np.nan)}, "NaN"),
        ({"state": ["1"] * 8}, "state"),
        ({"state": np.array(1.0)}, "list"),
        ({"state": np.ones((2, 4))}, "list"),
        ({"state": [1e300] * 8}, "float32"),
        ({"image": FRAME.astype(np.float32)}, "uint8"),
        ({"image": FRAME[..., :1]}, "uint8"),
        ({"image": FRAME[:4]}, "pixels"),
        ({"image": "picture"}, "uint8"),
        ({"image": None}, "image is missing"),
        ({"instruction": " "}, "sentence"),
        ({"instruction": 7}, "sentence"),
        ({"instruction": "\ud800"}, "JSON"),
        ({"unnorm_key": "bridge_orig"}, "libero_spatial_no_noops"),
        ({"unnorm_key": 3}, "unnorm_key"),
        ({"session": 3}, "session"),
    ],
)
def test_a_wrong_field_is_named_in_one_sentence(served: Live, change: dict, sentence: str) -> None:
    asked = PLAIN | {"wrist_image": WRIST, "state": STATE} | change
    response = served.act(json_numpy.dumps(asked))
    assert response.status_code == 400 and response.json().keys() == {"error"}
    assert sentence in response.json()["error"] and "\n" not in response.json()["error"]


def test_the_example_is_answered(served: Live) -> None:
    answer = served.act(served.get("/example").content, Accept="application/json")
    assert answer.status_code == 200 and len(answer.json()) == 7
