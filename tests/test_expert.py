"""expert.py: it solves tasks, and its answers are fit to be imitated. In a process of its own, without rendering."""

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prismatic.errors import ConfigError
from prismatic.expert import Expert
from prismatic.scene.suites import Libero, step_limit

LONGEST_REST = 3  # steps with the same answer "don't move": more would teach a policy to stop for ever


def play(suite: str, task_id: int, states: list[int], push: float = 0.0) -> list[dict[str, Any]]:
    """Episodes with their actions; `push` throws the hand off course in the middle of the way."""
    sim, episodes = Libero().simulator(suite, task_id), []
    for state in states:
        sim.reset(state)
        expert, actions, agreed, done = Expert(sim), [], True, False
        while not done and len(actions) < step_limit(suite):
            action = expert.chunk(None, sim.instruction)[0]
            if len(actions) % 10 == 0:
                agreed &= np.array_equal(
                    action, Expert(sim).chunk(None, "another expert, which knows nothing of the past")[0]
                )
            actions.append(action)
            pushed = action.copy()
            if 8 <= len(actions) < 14:
                pushed[:3] = np.clip(pushed[:3] + push, -1, 1)
            done = sim.step(pushed)
        where, target = (
            sim.places()[name] for name in (expert._object, expert._target.removesuffix("_contain_region"))
        )
        beside = np.linalg.norm((where - target)[:2])  # m, at the end
        episodes.append({"success": done, "actions": np.array(actions), "agreed": agreed, "beside": beside})
    sim.close()
    return episodes


def measure() -> dict[str, Any]:
    """Everything that the tests below look at."""
    goal = Libero().simulator("libero_goal", 0)  # open the drawer
    with pytest.raises(ConfigError, match="no scripted expert for task 0 of libero_goal"):
        Expert(goal)
    return {
        "bowl": play("libero_spatial", 0, [0, 1]),
        "pushed": play("libero_spatial", 2, [0], push=0.8),
        "box": play("libero_object", 6, [0]),
        "far": play("libero_spatial", 6, [0]),  # the arm gets straight there, and would stay so
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure).result()


def test_solves_its_tasks_in_few_steps_and_depends_on_the_present_state_alone(found: dict[str, Any]) -> None:
    for name, limit in (("bowl", 70), ("pushed", 90), ("box", 120), ("far", 100)):
        for episode in found[name]:
            assert episode["success"] and episode["agreed"], name
            assert len(episode["actions"]) <= limit, name


def test_it_sets_a_bowl_down_well_within_what_libero_allows_and_never_lets_it_go(found: dict[str, Any]) -> None:
    """30 mm: a policy that has learnt from it is less exact."""
    for name in ("bowl", "pushed", "far"):
        for episode in found[name]:
            assert episode["beside"] < 0.022, name
            assert (episode["actions"][-20:, 6] == 0).all(), name
    assert all((np.diff(episode["actions"][:, 6]) <= 0).all() for episode in found["bowl"])  # "far" grasps twice
    assert all(episode["actions"][-1, 6] == 1 for episode in found["box"])  # into the basket it falls


TABLE, LEFT, RIGHT, BOWL, OTHER = range(5)  # shapes


@pytest.mark.parametrize(
    ("touching", "opening", "held"),
    [
        ([(LEFT, BOWL), (BOWL, RIGHT)], 0.03, True),
        ([(LEFT, BOWL), (BOWL, RIGHT), (TABLE, BOWL)], 0.005, True),
        ([(LEFT, BOWL), (TABLE, OTHER)], 0.005, True),  # a pad has lost touch for a step
        ([(LEFT, BOWL)], 0.03, False),
        ([(LEFT, BOWL), (TABLE, BOWL)], 0.005, False),
        ([(RIGHT, OTHER), (LEFT, OTHER)], 0.005, False),
        ([], 0.005, False),
    ],
)
def test_a_bowl_is_held_by_both_fingers_or_by_one_that_alone_touches_it(
    touching: list[tuple[int, int]], opening: float, held: bool
) -> None:
    expert: Any = object.__new__(Expert)
    expert._data = SimpleNamespace(contact=SimpleNamespace(geom=np.array(touching, dtype=int).reshape(-1, 2)))
    expert._shapes = SimpleNamespace(owner=np.array([TABLE, 9, 9, BOWL, OTHER]))
    expert._body, expert._fingers, expert._opening = BOWL, [[LEFT], [RIGHT]], opening
    assert expert._held() is held


@pytest.mark.parametrize(("beside", "placed"), [(0.025, True), (0.035, False)])
def test_a_bowl_on_the_plate_is_left_alone_only_where_libero_counts_it(beside: float, placed: bool) -> None:
    expert: Any = object.__new__(Expert)
    expert._position, expert._target_point, expert._inside = np.array([beside, 0, 0.02]), lambda: np.zeros(3), False
    assert bool(expert._placed()) is placed


def carry(beside: float, above: float, *, inside: bool) -> np.ndarray:
    """The expert's command; m, of the carried object's origin beside the target's, and of its underside above it."""
    expert: Any = object.__new__(Expert)
    expert._position, expert._target_point, expert._inside = np.array([beside, 0, 0]), lambda: np.zeros(3), inside
    expert._obstacle_top, expert._unlock = lambda *_: 0.0, lambda error: None
    expert._lean = lambda: np.zeros(2)
    boxes = np.array([[beside, 0, above + 0.03]]), np.array([[0.05, 0.05, 0.03]])
    expert._data, expert._body = None, 0
    expert._shapes = SimpleNamespace(own=lambda body: None, boxes=lambda data, chosen: boxes)
    return expert._carry()


@pytest.mark.parametrize(
    ("beside", "above", "opens"), [(0.01, 0.11, True), (0.013, 0.11, True), (0.018, 0.11, False), (0.01, 0.118, False)]
)
def test_it_opens_near_the_middle_of_a_basket_and_near_its_bottom(beside: float, above: float, opens: bool) -> None:
    assert bool(carry(beside, above, inside=True)[6]) is opens


@pytest.mark.parametrize("above", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("beside", [0.0, 0.005, 0.01])
def test_it_presses_a_bowl_down_where_it_shall_stand_and_holds_it(beside: float, above: float) -> None:
    command = carry(beside, above, inside=False)
    assert command[2] == -0.5 and command[6] == 0


def test_commands_are_few_and_in_range_and_it_never_waits(found: dict[str, Any]) -> None:
    for episode in itertools.chain(*found.values()):
        actions, rest = episode["actions"], 0
        np.testing.assert_array_equal(actions[:, :6], np.round(actions[:, :6] * 4) / 4)
        assert np.abs(actions[:, :6]).max() <= 1
        assert set(actions[:, 6]) <= {0.0, 1.0}
        for before, now in itertools.pairwise(actions):
            rest = rest + 1 if not now[:6].any() and now[6] == before[6] else 0
            assert rest < LONGEST_REST
