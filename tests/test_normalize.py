"""Gripper, statistics, normalising: worked examples, and the original's own results where at hand."""

import json

import numpy as np
import pytest

from prismatic.normalize import action_statistics, gripper_open_is_one, normalize, unnormalize

RAW = np.array(
    [
        [0.1, -0.3, 0.0, 0.2, 0.0, 0.5, -1.0],
        [0.7, 0.4, 0.1, 0.2, 0.0, -0.5, 1.0],
        [-0.2, 0.9, 0.3, 0.2, 0.0, 0.1, 0.25],
    ],
    dtype=np.float32,
)


@pytest.fixture
def stats() -> dict:
    return action_statistics(gripper_open_is_one(RAW), None, 2)


def test_gripper_becomes_one_when_open_and_zero_when_closed():
    raw = RAW.copy()
    actions = gripper_open_is_one(raw)
    assert actions[:, 6].tolist() == [1.0, 0.0, 0.75]
    assert (actions[:, :6] == RAW[:, :6]).all() and (raw == RAW).all() and actions.dtype == np.float32


def test_statistics_have_the_original_form_and_the_right_values(stats):
    columns = ["mean", "std", "max", "min", "q01", "q99"]
    assert list(stats) == ["action", "proprio", "num_transitions", "num_trajectories"]
    assert list(stats["action"]) == [*columns, "mask"] and list(stats["proprio"]) == columns
    assert (stats["num_transitions"], stats["num_trajectories"]) == (3, 2)
    assert stats["action"]["mask"] == [True] * 6 + [False]
    assert all(values == [0.0] * 7 for values in stats["proprio"].values())
    # 0.1, 0.7, -0.2: quantiles 0.01 and 0.99 lie 2 % of the way into the outer gaps
    first = [stats["action"][key][0] for key in columns]
    assert first == pytest.approx([0.2, 0.374166, 0.7, -0.2, -0.194, 0.688], abs=1e-6)


def test_quantiles_are_float64_of_float32_differences():
    low, high = np.float32(0.1), np.float32(0.30000001)
    stats = action_statistics(np.array([[low], [high]]), None, 1)["action"]
    gap = float(np.float32(high - low))
    assert stats["q01"] == [float(low) + gap * 0.01]
    assert stats["q99"] == [float(high) - gap * (1 - 0.99)]


def test_normalize_maps_quantiles_to_the_ends_and_clips(stats):
    action = stats["action"]
    rows = np.array([action["q01"], action["q99"], np.full(7, 9.0)])
    normalized = normalize(rows, action)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized[:, 0], [-1, 1, 1], atol=1e-6)
    assert normalized[:, 3].tolist() == normalized[:, 4].tolist() == [0, 0, 0]  # never change in the data
    assert normalized[2, 6] == 9.0  # the gripper is passed on as it is


def test_a_gripper_that_never_moves_becomes_zero(stats):
    always_open = stats["action"] | {"min": [-1.0] * 6 + [1.0], "max": [1.0] * 7}
    assert normalize(gripper_open_is_one(RAW), always_open)[0, 6] == 0


def test_unnormalize_inverts_normalize_inside_the_quantiles(stats):
    action = stats["action"]
    inside = np.clip(gripper_open_is_one(RAW), action["q01"], action["q99"])
    back = unnormalize(normalize(inside, action), action)
    assert back.dtype == np.float64
    moving = [0, 1, 2, 5, 6]
    np.testing.assert_allclose(back[:, moving], inside[:, moving], atol=1e-6)


def test_unnormalize_without_a_mask_scales_everything(stats):
    unmasked = {key: stats["action"][key] for key in ("q01", "q99")}
    assert unnormalize(np.full(7, -1.0), unmasked).tolist() == unmasked["q01"]
    assert unnormalize(np.full(7, -1.0), stats["action"])[6] == -1.0


def test_reference_statistics_are_equal(reference):
    expected = json.loads((reference / "rlds_dataset_statistics.json").read_text())
    with np.load(reference / "rlds_pipeline.npz") as arrays:
        raw, episodes = arrays["raw_action"], arrays["episode_lengths"]
    assert action_statistics(gripper_open_is_one(raw), None, len(episodes)) in expected.values()


def test_reference_training_actions_are_bit_equal(reference):
    (stats,) = json.loads((reference / "rlds_dataset_statistics.json").read_text()).values()
    instructions = json.loads((reference / "rlds_pipeline.json").read_text())["episode_instructions_in_order"]
    with np.load(reference / "rlds_pipeline.npz") as arrays:
        kept = np.repeat([text != "" for text in instructions], arrays["episode_lengths"])
        normalized = normalize(gripper_open_is_one(arrays["raw_action"][kept]), stats["action"])
        assert normalized.tobytes() == arrays["train_action"].tobytes()


def test_reference_actions_are_unnormalized_equally(reference):
    stats = json.loads((reference / "checkpoint/dataset_statistics.json").read_text())
    for case in json.loads((reference / "generate.json").read_text()):
        action = unnormalize(case["normalized_action"], stats[case["unnorm_key"]]["action"])
        np.testing.assert_allclose(action, case["action"], rtol=0, atol=1e-9)
