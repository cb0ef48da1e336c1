"""simulator.py and suites.py. What renders runs once, in a process of its own: osmesa and torch don't mix."""

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic.errors import ConfigError, PolicyError
from prismatic.rollout import rollout
from prismatic.scene import renderer, suites
from prismatic.scene.renderer import choose_renderer
from prismatic.simulator import SETTLE_ACTION, LiberoSimulator

SUITE, TASK, STATE = "libero_spatial", 0, 3
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (4, 7))


def libero_reference() -> dict[str, Any]:
    """The same episode in LIBERO's own environment, cameras and all."""
    choose_renderer()
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    file = str(suites.bddl_file(SUITE, TASK))
    environment = OffScreenRenderEnv(bddl_file_name=file, camera_heights=256, camera_widths=256)
    environment.seed(0)
    environment.reset()
    environment.set_init_state(suites.init_states(SUITE, TASK)[STATE])
    observation: Any = None
    seen = []
    for action in [*[SETTLE_ACTION] * 10, *ACTIONS]:
        command = np.array(action, dtype=np.float64)
        if len(seen) >= 10:
            command[6] = -1.0 if action[6] > 0.5 else 1.0
        observation = environment.step(command)[0]
        seen.append(observation)
    hand = quat2axisangle(observation["robot0_eef_quat"])
    return {
        "frames": [step["agentview_image"][::-1, ::-1] for step in seen[9:]],
        "wrists": [step["robot0_eye_in_hand_image"][::-1, ::-1] for step in seen[9:]],
        "state": np.concatenate([observation["robot0_eef_pos"], hand, observation["robot0_gripper_qpos"]]),
        "joints": observation["robot0_joint_pos"],
        "physics": environment.sim.get_state().flatten(),
    }


def fixtures(environment: Any) -> np.ndarray:
    """Where a task's fixtures stand; a stored state does not say it."""
    model = environment.sim.model
    return np.array(
        [model.body_pos[model.body_name2id(fixture.root_body)] for fixture in environment.fixtures_dict.values()]
    )


def physics(sim: LiberoSimulator) -> np.ndarray:
    return sim.environment.sim.get_state().flatten()


def physics_of(sim: LiberoSimulator, name: str) -> np.ndarray:
    return sim.environment.sim.data.body_xpos[sim.environment.obj_body_id[name]]


class Broken:
    num_images, uses_state = 0, False

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        raise ZeroDivisionError("a bug")


class Still:
    num_images, uses_state = 2, True

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        assert frame.shape == wrist.shape == (256, 256, 3) and state.shape == (8,)
        return np.array([[0, 0, 0, 0, 0, 0, 1.0]] * 2)


def measure() -> dict[str, Any]:
    """Everything that the tests below look at."""
    found: dict[str, Any] = {"reference": libero_reference()}
    sim = suites.Libero().simulator(SUITE, TASK)
    sim.reset(STATE)
    found["rendered_unasked"] = sim.environment.sim._render_context_offscreen is not None
    found["frames"], found["wrists"] = [sim.frame()], [sim.wrist()]
    for action in ACTIONS:
        sim.step(action)
        found["frames"].append(sim.frame())
        found["wrists"].append(sim.wrist())
    found["state"], found["joints"] = sim.state(), sim.joint_angles()
    found["physics"] = physics(sim)
    sim.reset(STATE)
    found["again"] = sim.frame()
    found["broken"] = rollout(sim, Broken(), init_state=STATE, max_steps=5)
    watched: list[tuple[int, bool]] = []
    found["still"] = rollout(
        sim,
        Still(),
        init_state=STATE,
        max_steps=3,
        on_step=lambda step, frame: watched.append((step, frame is not None)),
    )
    found["watched"] = watched
    sim.close()

    fast = suites.Libero().simulator(SUITE, TASK, quality="fast")
    fast.reset(STATE)
    found["fast"] = fast.frame()
    for gripper in (0.0, 1.0):
        for _ in range(12):
            fast.step(np.array([0, 0, 0, 0, 0, 0, gripper]))
        found[f"fingers_{gripper:g}"] = float(np.abs(fast.state()[6:]).sum())
    fast.reset(STATE)
    found["kept"] = fast.frame()
    found["random"] = []
    for seed in (5, 6, 5):
        fast.reset(None, seed=seed)
        found["random"].append(physics(fast))
        for action in ACTIONS:
            fast.step(action)
    on_cabinet = suites.Libero().simulator(SUITE, 9)  # where the bowl's place depends on the cabinet's
    found["heights"] = []
    for seed in (7, 8):
        on_cabinet.reset(None, seed=seed)
        found["heights"].append(float(physics_of(on_cabinet, "akita_black_bowl_1")[2]))
    in_drawer = suites.Libero().simulator(SUITE, 4)  # whose drawer is opened by a draw of its own
    in_drawer._env.seed(0)
    in_drawer._env.reset()
    found["drawer"] = [fixtures(in_drawer.environment)]
    for _ in range(2):
        in_drawer.reset(STATE, settle=0)
        found["drawer"].append(fixtures(in_drawer.environment))
    with pytest.raises(ConfigError, match="num_trials_per_task"):
        fast.reset(50)
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(PolicyError, match="7 finite numbers"):
            fast.step(bad)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure).result()


def test_frames_are_pixel_equal_to_liberos_own_cameras(found: dict[str, Any]) -> None:
    for name in ("frames", "wrists"):
        for ours, theirs in zip(found[name], found["reference"][name], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_states_are_liberos(found: dict[str, Any]) -> None:
    np.testing.assert_array_equal(found["physics"], found["reference"]["physics"])
    np.testing.assert_allclose(found["state"], found["reference"]["state"], atol=1e-6)
    np.testing.assert_allclose(found["joints"], found["reference"]["joints"], atol=1e-6)
    assert found["state"].dtype == found["joints"].dtype == np.float32


def test_nothing_is_rendered_unasked_and_the_same_state_gives_the_same_frame_again(found: dict[str, Any]) -> None:
    assert not found["rendered_unasked"]
    np.testing.assert_array_equal(found["again"], found["frames"][0])


def test_frames_are_upright_and_fast_quality_is_close_but_not_equal(found: dict[str, Any]) -> None:
    """The wall behind the robot is grey and above, the wooden table warm and below."""
    frame = found["frames"][0].astype(float)
    warmth = frame[..., 0] - frame[..., 2]
    assert warmth[:40].mean() < 10 < 30 < warmth[-40:].mean()
    difference = np.abs(found["fast"].astype(int) - found["again"])
    assert 0 < difference.mean() < 3


def test_a_kept_renderer_draws_what_a_new_one_draws(found: dict[str, Any]) -> None:
    np.testing.assert_array_equal(found["kept"], found["fast"])


def test_fixtures_stand_where_a_new_environment_puts_them_however_many_episodes_were_before(
    found: dict[str, Any],
) -> None:
    new, first, second = found["drawer"]
    np.testing.assert_array_equal(first, new)
    np.testing.assert_array_equal(second, new)


def test_gripper_convention(found: dict[str, Any]) -> None:
    assert found["fingers_0"] < 0.01 < 0.07 < found["fingers_1"]


def test_randomised_states_depend_on_the_seed_alone(found: dict[str, Any]) -> None:
    first, other, again = found["random"]
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    stored = suites.init_states(SUITE, TASK)
    assert np.abs(stored[:, 1:] - first[1:]).max(axis=1).min() > 1e-3


def test_randomised_objects_stand_on_their_fixtures(found: dict[str, Any]) -> None:
    """A soft reset would place them by where the fixture stood an episode ago."""
    assert all(1.12 < height < 1.14 for height in found["heights"])


def test_rollout_counts_what_the_policy_does_and_a_crash_is_an_error(found: dict[str, Any]) -> None:
    still = found["still"]
    assert (still.success, still.steps, len(still.actions), still.error) == (False, 3, 3, None)
    assert found["watched"] == [(0, True), (1, False), (2, True)]  # the second action of a chunk needs no image
    assert found["broken"].error == "ZeroDivisionError: a bug"


def test_suites_limits_and_instructions() -> None:
    assert suites.suites()[:5] == sorted(suites.STEP_LIMITS)
    assert (suites.num_tasks("libero_90"), suites.num_init_states(SUITE, 0)) == (90, 50)
    limits = {"libero_spatial": 220, "libero_object_swap": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
    assert {suite: suites.step_limit(suite) for suite in limits} == limits
    black_bowl = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert suites.instruction(SUITE, 0) == suites.instruction("libero_spatial_swap", 0) == black_bowl
    reworded = "lift the black bowl between the plate and ramekin and set it on the plate"
    assert suites.instruction("libero_spatial_lan", 0) == reworded


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"libero_spatal.*task_suite_name.*libero_spatial"):
        suites.step_limit("libero_spatal")
    with pytest.raises(ConfigError, match=r"no task 10.*0 to 9"):
        suites.instruction(SUITE, 10)
    with pytest.raises(ConfigError, match="render_quality"):
        suites.Libero().simulator(SUITE, 0, quality="best")


def test_torch_init_states_are_read_without_running_a_pickle(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    states = np.random.default_rng(0).normal(size=(3, 5))
    torch.save(states, tmp_path / "good")
    np.testing.assert_array_equal(suites._torch_array(tmp_path / "good"), states)
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil")
    with pytest.raises(pickle.UnpicklingError):
        suites._torch_array(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_renderer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(ConfigError, match="apt-get install libosmesa6"):
        choose_renderer()
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(ConfigError, match="MUJOCO_GL=glfw"):
        choose_renderer()


@pytest.mark.parametrize(
    ("works", "asked", "chosen", "device"),
    [
        ({None, "0"}, None, "egl", "0"),
        ({None, "2"}, None, "egl", "2"),  # the first two cards are somebody else's
        (set(), None, "osmesa", None),
        ({None}, "1", "egl", "1"),
        (set(), "1", "osmesa", "1"),
    ],
)
def test_the_first_card_that_draws_is_taken(
    works: set[str | None], asked: str | None, chosen: str, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if asked:
        monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", asked)
    monkeypatch.setattr(renderer.ctypes.util, "find_library", lambda name: name)
    monkeypatch.setattr(renderer.Path, "exists", lambda path: True)
    monkeypatch.delitem(renderer.sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(renderer, "_egl_works", lambda more: more.get("MUJOCO_EGL_DEVICE_ID") in works)
    assert choose_renderer() == chosen
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == device
    if chosen == "egl" and not asked:  # also where somebody has asked for EGL already
        monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")
        assert choose_renderer() == "egl" and os.environ.get("MUJOCO_EGL_DEVICE_ID") == device
