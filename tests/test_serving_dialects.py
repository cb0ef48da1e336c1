"""Each dialect as its own client speaks it: the clients are the published packages, unchanged."""

import asyncio
from collections.abc import Iterator

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
from vla_eval.specs import GRIPPER_CLOSE_POS, DimSpec, check_specs

from prismatic.normalize import gripper_dims
from tests.fake_policy import FakePolicy, picture
from tests.live_server import Live, live

WORDS = "pick up the bowl"
FRAME, WRIST, STATE = picture(1), picture(2), np.linspace(-1, 1, 8)
PLAIN = {"image": FRAME, "instruction": WORDS}  # OpenVLA's own request
OPENPI = {"observation/image": FRAME, "observation/wrist_image": WRIST, "observation/state": STATE, "prompt": WORDS}
PAYLOAD = {"images": {"agentview": FRAME, "wrist": WRIST}, "task_description": WORDS, "states": STATE}  # vla-eval's
CHUNK = 5
FAKE, FAKE_SMALL = FakePolicy(num_actions_chunk=CHUNK, uses_state=True), FakePolicy(num_images=1)
SMALL_ANSWER, ANSWER = FAKE_SMALL.answer(FRAME, WORDS)[0], FAKE.answer(FRAME, WORDS, WRIST, STATE)
CLOSE_POSITIVE = ANSWER.copy()
CLOSE_POSITIVE[:, 6] = -0.5  # 0.75 on the scale 1 open … 0 close is -0.5 on -1 open … +1 close


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    """A policy that wants all there is, and answers chunks."""
    with live(FAKE) as server:
        yield server


@pytest.fixture(scope="module")
def small() -> Iterator[Live]:
    """One image, one action: OpenVLA's own kind."""
    with live(FAKE_SMALL) as server:
        yield server


def test_openvla_act_answers_as_it_is_asked(small: Live) -> None:
    """An array of seven; a string to a request in a string; plain numbers where they are accepted. Fields of no meaning are passed over."""
    answer = json_numpy.loads(small.act(json_numpy.dumps(PLAIN | {"unnorm_key": "libero_spatial"})).text)
    assert isinstance(answer, np.ndarray) and answer.shape == (7,) and answer.dtype == np.float64
    text = requests.post(small.url + "/act", json={"encoded": json_numpy.dumps(PLAIN)}, timeout=10).json()
    asked = json_numpy.dumps(PLAIN | {"more": {"nested": [[1], None, True]}})
    plain = small.act(asked, Accept="application/json").json()
    for found in (answer, json_numpy.loads(text), plain):
        np.testing.assert_array_equal(found, SMALL_ANSWER)


def test_openvla_oft_act_answers_a_list_of_arrays(served: Live) -> None:
    asked = {"full_image": FRAME, "left_wrist_image": WRIST, "state": STATE, "instruction": WORDS}
    answer = json_numpy.loads(served.act(json_numpy.dumps(asked)).text)
    assert isinstance(answer, list)
    np.testing.assert_array_equal(answer, ANSWER)


def test_the_example_is_answered_in_full(small: Live, served: Live) -> None:
    assert np.shape(json_numpy.loads(small.act(requests.get(small.url + "/example", timeout=10).text).text)) == (7,)
    assert np.shape(json_numpy.loads(served.act(requests.get(served.url + "/example", timeout=10).text).text)) == (
        CHUNK,
        7,
    )


def test_inspect_robots_widowx(small: Live) -> None:
    policy = OpenVLAPolicy(server_url=small.url, unnorm_key="libero_spatial", jpeg_roundtrip=False, resize_px=32)
    policy.reset(Scene(id="scene", instruction=WORDS))
    chunk = policy.act(Observation(images={"external_cam": FRAME}, state={}))
    np.testing.assert_array_equal(chunk.actions[0].data, SMALL_ANSWER)


def test_openpi_gets_chunks_with_the_simulators_gripper(served: Live) -> None:
    client = WebsocketClientPolicy("127.0.0.1", served.port)
    assert client.get_server_metadata()["num_actions_chunk"] == CHUNK
    answer = client.infer(OPENPI)
    np.testing.assert_allclose(answer["actions"], CLOSE_POSITIVE, rtol=1e-6)
    assert answer["server_timing"]["infer_ms"] >= 0
    with pytest.raises(RuntimeError, match="prompt must be a sentence"):
        client.infer(OPENPI | {"prompt": ""})
    with pytest.raises(Exception, match="1011"):
        client.infer(OPENPI)


@pytest.mark.parametrize("grippers", [[], [1, 4]])
def test_only_a_gripper_is_turned(small: Live, monkeypatch: pytest.MonkeyPatch, grippers: list[int]) -> None:
    """A policy that learnt with --gripper none has none; one of two arms has two."""
    monkeypatch.setitem(small.service.metadata, "gripper_dims", grippers)
    expected = SMALL_ANSWER.copy()
    expected[grippers] = 1 - 2 * expected[grippers]
    answer = WebsocketClientPolicy("127.0.0.1", small.port).infer({"observation/image": FRAME, "prompt": WORDS})
    np.testing.assert_allclose(answer["actions"], [expected])


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
            with pytest.raises(RuntimeError, match=r"images\.agentview is missing"):
                await connection.act({"images": {}, "task_description": WORDS})
            actions.append((await connection.act(PAYLOAD))["actions"])  # the connection outlives an error
            return connection.server_info

    return actions, asyncio.run(play())


@pytest.mark.parametrize(("path", "image_format"), [("", "png"), ("/vla-eval", "raw")])
def test_vla_eval_gets_one_action_an_observation_and_no_rest_of_another_episode(
    served: Live, monkeypatch: pytest.MonkeyPatch, path: str, image_format: str
) -> None:
    monkeypatch.setattr("vla_eval.protocol.numpy_codec._image_format", image_format)
    FAKE.streams.clear()
    actions, info = vla_eval(served, path, [CHUNK + 2, 1])
    chunk = CLOSE_POSITIVE
    np.testing.assert_allclose(actions, [*chunk, *chunk[:2], chunk[0], chunk[0]], rtol=1e-6)
    first, second, third, _ = FAKE.streams  # two questions in the first episode
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


def test_a_session_names_the_stream(small: Live) -> None:
    FAKE_SMALL.streams.clear()
    for session in ("robot 1", "robot 2", "robot 1", None):
        assert small.act(json_numpy.dumps(PLAIN | {"session": session})).status_code == 200
    first, second, third, unnamed = FAKE_SMALL.streams
    assert first == third != second and unnamed is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"wrist_image": None}, "two images"),
        ({"other_wrist": WRIST}, "one wrist image"),
        ({"state": None}, "8 numbers"),
        ({"state": [1.0] * 7}, "8 numbers"),
        ({"state": ["1"] * 8}, "state"),
        ({"state": [1e300] * 8}, "float32"),
        ({"image": FRAME.astype(np.float32)}, "uint8"),
        ({"image": FRAME[:4]}, "pixels"),
        ({"image": None}, "image is missing"),
        ({"instruction": " "}, "sentence"),
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
