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
STATS = action_statistics(gripper_open_is_one(RAW), None, 2)
ACTION = STATS["action"]


def test_gripper_becomes_one_when_open_and_zero_when_closed():
    raw = RAW.copy()
    actions = gripper_open_is_one(raw)
    assert actions[:, 6].tolist() == [1.0, 0.0, 0.75]
    assert (actions[:, :6] == RAW[:, :6]).all() and (raw == RAW).all() and actions.dtype == np.float32


def test_statistics_have_the_original_form_and_the_right_values():
    columns = ["mean", "std", "max", "min", "q01", "q99"]
    assert list(STATS) == ["action", "proprio", "num_transitions", "num_trajectories"]
    assert list(ACTION) == [*columns, "mask"] and list(STATS["proprio"]) == columns
    assert (STATS["num_transitions"], STATS["num_trajectories"]) == (3, 2)
    assert ACTION["mask"] == [True] * 6 + [False]
    assert all(values == [0.0] * 7 for values in STATS["proprio"].values())
    # 0.1, 0.7, -0.2: quantiles 0.01 and 0.99 lie 2 % of the way into the outer gaps
    first = [ACTION[key][0] for key in columns]
    assert first == pytest.approx([0.2, 0.374166, 0.7, -0.2, -0.194, 0.688], abs=1e-6)


def test_quantiles_are_float64_of_float32_differences():
    low, high = np.float32(0.1), np.float32(0.30000001)
    stats = action_statistics(np.array([[low], [high]]), None, 1)["action"]
    gap = float(np.float32(high - low))
    assert stats["q01"] == [float(low) + gap * 0.01]
    assert stats["q99"] == [float(high) - gap * (1 - 0.99)]


def test_normalize_maps_quantiles_to_the_ends_and_clips():
    rows = np.array([ACTION["q01"], ACTION["q99"], np.full(7, 9.0)])
    normalized = normalize(rows, ACTION)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized[:, 0], [-1, 1, 1], atol=1e-6)
    assert normalized[:, 3].tolist() == normalized[:, 4].tolist() == [0, 0, 0]  # never change in the data
    assert normalized[2, 6] == 9.0  # the gripper is passed on as it is, unless it never moves
    always_open = ACTION | {"min": [-1.0] * 6 + [1.0], "max": [1.0] * 7}
    assert normalize(gripper_open_is_one(RAW), always_open)[0, 6] == 0


def test_unnormalize_inverts_normalize_inside_the_quantiles():
    inside = np.clip(gripper_open_is_one(RAW), ACTION["q01"], ACTION["q99"])
    back = unnormalize(normalize(inside, ACTION), ACTION)
    assert back.dtype == np.float64
    moving = [0, 1, 2, 5, 6]
    np.testing.assert_allclose(back[:, moving], inside[:, moving], atol=1e-6)
    unmasked = {key: ACTION[key] for key in ("q01", "q99")}
    assert unnormalize(np.full(7, -1.0), unmasked).tolist() == unmasked["q01"]  # without a mask everything is scaled
    assert unnormalize(np.full(7, -1.0), ACTION)[6] == -1.0


def test_reference_statistics_and_training_actions_are_bit_equal(reference):
    expected = json.loads((reference / "rlds_dataset_statistics.json").read_text())
    (stats,) = expected.values()
    instructions = json.loads((reference / "rlds_pipeline.json").read_text())["episode_instructions_in_order"]
    arrays = np.load(reference / "rlds_pipeline.npz")
    actions, lengths = gripper_open_is_one(arrays["raw_action"]), arrays["episode_lengths"]
    assert action_statistics(actions, None, len(lengths)) == stats
    kept = np.repeat([text != "" for text in instructions], lengths)
    assert normalize(actions[kept], stats["action"]).tobytes() == arrays["train_action"].tobytes()


def test_reference_actions_are_unnormalized_equally(reference):
    stats = json.loads((reference / "checkpoint/dataset_statistics.json").read_text())
    for case in json.loads((reference / "generate.json").read_text()):
        action = unnormalize(case["normalized_action"], stats[case["unnorm_key"]]["action"])
        np.testing.assert_allclose(action, case["action"], rtol=0, atol=1e-9)
