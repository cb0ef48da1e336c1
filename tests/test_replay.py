"""replay.py: HDF5 files in LIBERO's layout, made by the scripted expert, become staged episodes and a data set.

What needs the simulator runs in processes of its own: osmesa and torch don't mix.
"""

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prismatic.data.staging import load_episode
from prismatic.episodes.replay import Replay, Replays, find_replays
from prismatic.errors import ConfigError
from prismatic.expert import Expert
from prismatic.image import decode_jpeg, encode_jpeg
from prismatic.scene.renderer import choose_renderer
from prismatic.scene.suites import Libero, init_states, task_name
from tests.drawn_demonstrations import write_libero_file
from tests.fake_simulator import ScriptedSimulator

ROOT = Path(__file__).resolve().parents[1]
SUITE, TASK = "libero_spatial", 0
FILE = f"{task_name(SUITE, TASK)}_demo.hdf5"
STATE_SIZE = init_states(SUITE, TASK).shape[1]
WAVE = 12  # step at which the hand stands still and shuts its fingers: no motion, and not a no-op
LOOKS = (0, WAVE, WAVE + 1, 40)  # kept steps whose pictures are compared


def expert_demonstration() -> dict[str, Any]:
    """An episode of the expert: at each step state, action in LIBERO's convention and proprioception; some pictures."""
    choose_renderer()
    sim = Libero().simulator(SUITE, TASK)
    sim.reset(2)
    first_state = sim.environment.sim.get_state().flatten()
    sim.reset(first_state)
    expert = Expert(sim)
    states, actions, proprio, seen = [first_state], [], [], {}
    solved = False
    while not solved and len(actions) < 120:
        proprio.append((sim.state(), sim.joint_angles()))
        if len(actions) in LOOKS:
            seen[len(actions)] = sim.frame(), sim.wrist()
        action = expert.chunk(None, sim.instruction)[0] if len(actions) != WAVE else np.zeros(7)
        solved = sim.step(action)
        actions.append([*action[:6], 1 - 2 * action[6]])
        states.append(sim.environment.sim.get_state().flatten())
    assert solved
    sim.close()
    return {"states": np.array(states[:-1]), "actions": np.array(actions), "proprio": proprio, "seen": seen}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(expert_demonstration).result()


def with_no_ops(recorded: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """States and actions with steps put in that hold still: at the start, twice on the way, with shut fingers, at the end."""
    states, actions = recorded["states"], recorded["actions"]
    places = [0, 5, 5, int(np.flatnonzero(actions[:, 6] > 0)[-1]), len(actions)]
    still = np.zeros((len(places), 7))
    still[:, 0] = 5e-5  # below the threshold
    still[0, 6] = 1.0  # at the first step the gripper doesn't count
    still[1:, 6] = [actions[place - 1, 6] for place in places[1:]]
    states = np.insert(states, places, states[[min(place, len(states) - 1) for place in places]], axis=0)
    return states, np.insert(actions, places, still, axis=0)


def test_the_script_replays_what_ends_in_success(recorded: dict[str, Any], tmp_path: Path) -> None:
    states, actions = with_no_ops(recorded)
    abandoned = slice(None, 9)  # ends long before the bowl is reached
    idle = np.zeros((3, 7))
    write_libero_file(
        tmp_path / "hdf5" / FILE,
        [(states, actions), (states[abandoned], actions[abandoned]), (states[:3], idle), (states, actions)],
    )
    places = ["--data_root_dir", str(tmp_path), "--dataset_name", "replayed", "--from_hdf5", str(tmp_path / "hdf5")]
    options = ["--task_suite_name", SUITE, "--task_ids", str(TASK), "--num_demos_per_task", "3", "--num_workers", "1"]
    command = [sys.executable, "collect.py", *places, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "task 0: 2 of 3 demonstrations dropped" in done.stdout
    assert f"1 of 3 demonstrations kept; 5 of their {len(actions)} steps are no-ops" in done.stdout
    assert json.loads((tmp_path / "replayed/1.0.0/features.json").read_text())

    stage = tmp_path / "replayed_staged"
    names = ["settings.json", "sources.json", "task00-00000.npz", "task00-00001.failed", "task00-00002.failed"]
    assert sorted(path.name for path in stage.iterdir()) == names
    episode = load_episode(stage / names[2])
    np.testing.assert_array_equal(episode.action, recorded["actions"].astype(np.float32))
    np.testing.assert_array_equal(episode.state, [state for state, _ in recorded["proprio"]])
    np.testing.assert_array_equal(episode.joint_state, [joints for _, joints in recorded["proprio"]])
    assert episode.instruction.startswith("pick up the black bowl between")
    assert episode.file_path == f"{FILE}/demo_0"
    for step, (frame, wrist) in recorded["seen"].items():
        assert episode.images[step] == encode_jpeg(frame), step
        assert episode.wrist_images[step] == encode_jpeg(wrist), step

    kept = (stage / names[2]).stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.stdout == done.stdout, again.stderr
    assert (stage / names[2]).stat().st_mtime_ns == kept


# --- without a simulator --------------------------------------------------------------------------------------------


def small_demo(folder: Path, actions: np.ndarray, name: str = FILE) -> Replay:
    write_libero_file(folder / name, [(np.full((len(actions), STATE_SIZE), 0.5), actions)])
    [job] = find_replays(folder, SUITE, [TASK], stage=folder / "staged", limit=50)
    return job


def test_files_may_move_but_not_change(tmp_path: Path) -> None:
    actions = np.full((3, 7), 0.5)
    (tmp_path / "staged").mkdir()
    Replays([small_demo(tmp_path / "a", actions)]).compare(tmp_path / "staged")
    Replays([small_demo(tmp_path / "b", actions)]).compare(tmp_path / "staged")
    Replays([small_demo(tmp_path / "c", 2 * actions)]).compare(tmp_path / "staged")  # nothing of it was played yet
    job = small_demo(tmp_path / "d", -actions)
    job.path.parent.mkdir()
    job.path.with_suffix(".failed").touch()
    with pytest.raises(ConfigError, match=r"demo_0 of .*d/.*_demo\.hdf5 \(from_hdf5\) is not the one"):
        Replays([job]).compare(tmp_path / "staged")


def record(job: Replay, solved: Callable[[int], bool], *, kept: int) -> ScriptedSimulator:
    sim: Any = ScriptedSimulator(solved)
    assert job.record(sim, lambda: None) == kept
    return sim


def test_the_last_step_decides_and_a_no_op_is_not_executed(tmp_path: Path) -> None:
    actions = np.zeros((5, 7))
    actions[:, 6] = [-1, -1, 1, 1, 0]
    actions[[0, 4], 2] = 0.3
    job = small_demo(tmp_path, actions)
    assert job.steps == 5
    sim = record(job, lambda count: True, kept=3)
    assert (sim.started_from == 0.5).all()
    # steps 1 and 3 hold still with the fingers as before; LIBERO's -1 is the policy's 1, and 0 (hold) stays in between
    np.testing.assert_allclose([command[2] for command in sim.commands], [0.3, 0, 0.3])
    np.testing.assert_allclose([command[6] for command in sim.commands], [1, 0, 0.5])
    episode = load_episode(job.path)
    np.testing.assert_array_equal(episode.action[:, 6], [-1, 1, 0])
    assert [decode_jpeg(image).max() for image in episode.images] == [0, 20, 40]  # each before its action
    job.path.unlink()
    record(job, lambda count: count < 3, kept=0)  # solved on the way, not in the end
    assert not job.path.exists()


def test_demonstrations_come_in_their_numbers_order_and_once(tmp_path: Path) -> None:
    state, action = np.zeros((2, STATE_SIZE)), np.ones((2, 7))
    write_libero_file(tmp_path / FILE, [(state, action)] * 12)
    jobs = find_replays(tmp_path, SUITE, [TASK], stage=tmp_path / "staged", limit=11)
    assert [job.demo for job in jobs] == [f"demo_{number}" for number in range(11)]
    assert [job.quality for job in jobs] == ["standard"] * 11
    assert [job.path.name for job in jobs] == sorted(job.path.name for job in jobs)
    (tmp_path / "staged").mkdir()
    jobs[0].path.touch()
    jobs[1].path.with_suffix(".failed").touch()
    schedule = Replays(jobs)
    assert (schedule.total, schedule.found()) == (11, 2)
    assert [schedule.next_job() for _ in range(10)] == [*jobs[2:], None]  # neither the kept nor the failed one again
    jobs[0].path.unlink()
    with pytest.raises(ConfigError, match=r"none of the 11 demonstrations in .* ends in success"):
        schedule.report()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("no folder", "there is no folder"),
        ("no file", rf"lacks {FILE} \(task 0\)"),
        ("truncated", r"can't be read \(.*truncated"),
        ("no data", "holds no demonstration"),
        ("empty", "holds no demonstration"),
        ("six numbers", r"data/demo_0/actions of .* should be \(steps, 7\) and is \(4, 6\)"),
        ("no states", rf"data/demo_0/states of .* should be \(steps, {STATE_SIZE}\) and is missing"),
        ("texts", r"data/demo_0/actions of .* should be \(steps, 7\) and is missing, or no numbers"),
        ("another task's states", rf"data/demo_0/states of .* and is \(4, {STATE_SIZE + 1}\)"),
        ("not a number", "data/demo_0 of .* not finite"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, damage: str, sentence: str) -> None:
    folder, actions = tmp_path / "hdf5", np.ones((4, 7))
    path = folder / FILE
    if damage != "no folder":
        small_demo(folder, actions)
    if damage == "no file":
        path.rename(folder / "other_demo.hdf5")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "six numbers":
        write_libero_file(path, [(np.zeros((4, STATE_SIZE)), actions[:, :6])])
    elif damage == "texts":
        write_libero_file(path, [(np.zeros((4, STATE_SIZE)), actions.astype("S3"))])
    elif damage == "another task's states":
        write_libero_file(path, [(np.zeros((4, STATE_SIZE + 1)), actions)])
    elif damage in ("no data", "empty", "no states"):
        with h5py.File(path, "r+") as file:
            del file[{"no data": "data", "empty": "data/demo_0", "no states": "data/demo_0/states"}[damage]]
    elif damage == "not a number":
        actions[2, 1] = np.nan
        small_demo(folder, actions)
    with pytest.raises(ConfigError, match=sentence):
        for job in find_replays(folder, SUITE, [TASK], stage=tmp_path / "staged", limit=50):
            record(job, lambda count: True, kept=0)
    assert not (tmp_path / "staged").exists()
