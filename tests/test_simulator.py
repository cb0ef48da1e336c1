"""simulator.py. What renders runs once, in a process of its own: osmesa and torch don't mix."""

import multiprocessing
import tempfile
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic import robosuite_tamed
from prismatic.errors import ConfigError, PolicyError
from prismatic.robosuite_tamed import compiled
from prismatic.scene import suites
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


def measure() -> dict[str, Any]:
    """Everything that the tests below look at."""
    found: dict[str, Any] = {"reference": libero_reference()}
    sim = suites.Libero().simulator(SUITE, TASK)
    sim.reset(STATE)
    found["rendered_unasked"] = sim.environment.sim._render_context_offscreen is not None
    found["frames"], found["wrists"] = [sim.frame()], [sim.wrist()]
    first, found["first_state"] = sim.moment(), sim.state()
    for action in ACTIONS:
        sim.step(action)
        found["frames"].append(sim.frame())
        found["wrists"].append(sim.wrist())
    found["state"], found["joints"] = sim.state(), sim.joint_angles()
    found["physics"] = physics(sim)
    sim.environment.sim.model._model.site_rgba[:, 3] = 1  # as LIBERO lights a burner
    sim.show(first)
    found["shown"] = sim.frame(), sim.wrist(), sim.state()
    sim.reset(STATE)
    found["again"] = sim.frame()
    sim.close()

    fast = suites.Libero().simulator(SUITE, TASK, quality="fast")
    fast.reset(STATE)
    found["fast"] = fast.frame()
    for gripper in (0.0, 1.0):
        for _ in range(12):
            fast.step(np.array([0, 0, 0, 0, 0, 0, gripper]))
        found[f"fingers_{gripper:g}"] = float(np.abs(fast.state()[6:]).sum())
    before, found["left"] = weakref.ref(fast.environment.sim.model._model), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robosuite_tamed, "compiled", lambda xml: found["left"].append(before()) or compiled(xml))
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
        found["heights"].append(float(on_cabinet.places()["akita_black_bowl_1"][2]))
    in_drawer = suites.Libero().simulator(SUITE, 4)  # whose drawer is opened by a draw of its own
    in_drawer._env.seed(0)
    in_drawer._env.reset()
    found["drawer"] = [fixtures(in_drawer.environment)]
    for _ in range(2):
        in_drawer.reset(STATE, settle=0)
        found["drawer"].append(fixtures(in_drawer.environment))
    with pytest.raises(ConfigError, match="num_trials_per_task"):
        fast.reset(50)
    with pytest.raises(ConfigError, match="render_quality"):
        suites.Libero().simulator(SUITE, 0, quality="best")
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(PolicyError, match="7 finite numbers"):
            fast.step(bad)
    found["compiled"] = compiled.cache_info().misses
    import mujoco  # when the renderer is chosen

    model = fast.environment.sim.model._model
    with tempfile.TemporaryDirectory() as folder:
        mujoco.mj_saveLastXML(f"{folder}/last.xml", model)  # pyright: ignore[reportAttributeAccessIssue]
        found["held"] = Path(folder, "last.xml").read_text()
    found["shadows"] = [fast._context.con.shadowSize]
    model.light_castshadow[0], model.vis.quality.shadowsize = 1, 1024
    found["shadows"].append(fast._make_render_context(fast.environment.sim).con.shadowSize)
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
    """Also with a kept renderer."""
    assert not found["rendered_unasked"]
    np.testing.assert_array_equal(found["again"], found["frames"][0])
    np.testing.assert_array_equal(found["kept"], found["fast"])


def test_an_earlier_moment_is_shown_as_it_was(found: dict[str, Any]) -> None:
    before = found["frames"][0], found["wrists"][0], found["first_state"]
    assert not np.array_equal(found["first_state"], found["state"])
    for then, now in zip(before, found["shown"], strict=True):
        np.testing.assert_array_equal(now, then)


def test_frames_are_upright_and_fast_quality_is_close_but_not_equal(found: dict[str, Any]) -> None:
    """The wall behind the robot is grey and above, the wooden table warm and below."""
    frame = found["frames"][0].astype(float)
    warmth = frame[..., 0] - frame[..., 2]
    assert warmth[:40].mean() < 10 < 30 < warmth[-40:].mean()
    difference = np.abs(found["fast"].astype(int) - found["again"])
    assert 0 < difference.mean() < 3


def test_fixtures_stand_where_a_new_environment_puts_them_however_many_episodes_were_before(
    found: dict[str, Any],
) -> None:
    new, first, second = found["drawer"]
    np.testing.assert_array_equal(first, new)
    np.testing.assert_array_equal(second, new)


def test_a_scene_is_compiled_once(found: dict[str, Any]) -> None:
    """What an episode changes in its model, such as where fixtures stand, is not in the next one's: the tests above."""
    assert found["compiled"] == 1


def test_the_scene_before_is_gone_when_the_next_is_made(found: dict[str, Any]) -> None:
    """250 MB of each process at its fullest."""
    assert found["left"] == [None]


def test_mujoco_holds_no_second_scene_and_shadows_only_where_a_light_casts_one(found: dict[str, Any]) -> None:
    """180 and 64 MB of each process."""
    assert "<worldbody/>" in found["held"] and "texture" not in found["held"]
    assert found["shadows"] == [0, 1024]


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
