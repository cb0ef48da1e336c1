"""recorder.py in the real simulator: failures made on purpose get their verdicts, and a part's goal is reached where LIBERO says so.

In a process of its own, without rendering. The hand follows the scripted expert, which is told another object or target, or is interrupted.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from prismatic.expert import Expert
from prismatic.rollout import rollout
from prismatic.scene.diagnosis import Diagnosis, diagnose
from prismatic.scene.suites import Libero
from prismatic.scene.trajectory import MOVE_STAGES, PLACE_STAGES, Trajectory
from prismatic.simulator import LiberoSimulator

Actions = Iterator[np.ndarray]
OPEN, CLOSE = 1.0, 0.0
BOWL, OTHER_BOWL, PLATE, STOVE = "akita_black_bowl_1", "akita_black_bowl_2", "plate_1", "flat_stove_1_cook_region"
DRAWER = "wooden_cabinet_1_top_level"


class Hand(Expert):
    """The expert for any object and target of a scene, and a few plain motions."""

    def __init__(self, sim: LiberoSimulator, thing: str = BOWL, target: str = PLATE) -> None:
        self._sim, self._rounding, self._model = sim, 0.25, None
        self._object, self._target, self._inside = thing, target, False
        self.shift = np.zeros(3)  # m, added to the target

    def _target_point(self, data: Any = None) -> np.ndarray:
        return super()._target_point(data) + self.shift

    def act(self) -> np.ndarray:
        return self.chunk(None, "")[0]

    @property
    def place(self) -> np.ndarray:
        """(3,) m, of the hand now."""
        return self._sim.state()[:3].astype(float)

    def go(self, point: np.ndarray, *, by: tuple[float, float, float] = (0, 0, 0), gripper: float = CLOSE) -> Actions:
        """Straight to a point (3,) m in the world, moved `by` an offset."""
        for _ in range(90):
            error = point + by - self.place
            if np.linalg.norm(error) < 0.008:
                return
            yield np.array([*np.clip(20 * error, -1, 1), 0, 0, 0, gripper])


def still(gripper: float, steps: int) -> Actions:
    for _ in range(steps):
        yield np.array([0, 0, 0, 0, 0, 0, gripper])


def puts(sim: LiberoSimulator, thing: str, where: str) -> Actions:
    """As the expert would."""
    hand = Hand(sim, thing, where)
    while True:
        yield hand.act()


def closes_beside(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim).go(sim.places()[BOWL][:3], by=(0, 0, 0.1), gripper=OPEN)
    for gripper in (CLOSE, OPEN, CLOSE):
        yield from still(gripper, 15)


def lifts_and_lets_go(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    while True:
        action = hand.act()
        if hand._held():
            break
        yield action
    yield from hand.go(hand.place, by=(0, 0, 0.15))
    yield from still(OPEN, 80)


def hangs_over_the_plate(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    hand.shift = np.array([0, 0, 0.1])
    while True:
        action = hand.act()
        action[6] = CLOSE if hand._held() else action[6]
        yield action


def drags(sim: LiberoSimulator, until: float) -> Actions:
    """Shut fingers press on the bar of the drawer's handle, and drag it open until its value (m) is below `until`."""
    hand, environment = Hand(sim), sim.environment
    model, data = environment.sim.model._model, environment.sim.data._data
    joint = model.joint(DRAWER).id
    shapes = np.flatnonzero(model.geom_bodyid == model.jnt_bodyid[joint])
    solid = shapes[(model.geom_contype[shapes] > 0) | (model.geom_conaffinity[shapes] > 0)]
    bar = solid[np.abs(data.geom_xpos[solid, 1]).argmin()]  # nearest to the table's middle, to which drawers open
    yield from hand.go(data.geom_xpos[bar], by=(0, 0, 0.1))
    yield from hand.go(data.geom_xpos[bar], by=(0, 0, 0.03))
    while data.qpos[model.jnt_qposadr[joint]] > until:
        away = hand.place - data.geom_xpos[bar]
        drag = 0.25 if away[2] < 0.025 and away[1] < 0.006 else -20 * min(away[1], 0.25)
        yield np.array([np.clip(-20 * away[0], -1, 1), drag, -0.4, 0, 0, 0, CLOSE])
    yield from hand.go(hand.place, by=(0, 0, 0.1))


class Script:
    """A policy that plays the actions of a generator, then stands still."""

    num_images, uses_state = 0, False

    def __init__(self, sim: LiberoSimulator, play: Callable[[LiberoSimulator], Actions]) -> None:
        self._sim, self._play = sim, play
        self._actions: Actions | None = None

    def chunk(self, frame: Any, instruction: str, wrist: Any = None, state: Any = None) -> np.ndarray:
        self._actions = self._actions or self._play(self._sim)
        return next(self._actions, np.array([0, 0, 0, 0, 0, 0, CLOSE]))[None]


class Case(NamedTuple):
    verdict: str
    suite: str
    task_id: int
    play: Callable[[LiberoSimulator], Actions]
    steps: int
    words: str = ""  # that the sentence must contain
    stages: tuple[str, ...] = ()  # that it reaches


CASES = [
    Case("closed_beside", "libero_spatial", 0, closes_beside, 90, "2 times", ("approached",)),
    Case("wrong_object", "libero_spatial", 0, partial(puts, thing=OTHER_BOWL, where=PLATE), 80, "black bowl 2 instead of"),
    Case("dropped", "libero_spatial", 0, lifts_and_lets_go, 80, "gripper opened", PLACE_STAGES[:4]),
    Case("never_released", "libero_spatial", 0, hangs_over_the_plate, 100, "over the plate", PLACE_STAGES[:5]),
    Case("wrong_target", "libero_spatial", 0, partial(puts, thing=BOWL, where=STOVE), 150, "rests on the flat stove", PLACE_STAGES[:4]),
    Case("not_open_enough", "libero_90", 7, partial(drags, until=-0.05), 120, "14.0 cm", MOVE_STAGES[:3]),
]  # fmt: skip
# tasks to open and to close a drawer, to turn a stove on and off
PARTS = {"open": ("libero_goal", 0), "close": ("libero_90", 28), "turnon": ("libero_goal", 7), "turnoff": ("libero_90", 39)}  # fmt: skip


def played(case: Case) -> Diagnosis:
    sim = Libero().simulator(case.suite, case.task_id)
    watch = partial(Libero().recorder, sim)
    episode = rollout(sim, Script(sim, case.play), init_state=0, max_steps=case.steps, recorder=watch)
    sim.close()
    return diagnose(episode.trajectory, success=episode.success)


def moved(suite: str, task_id: int) -> Trajectory:
    """The goal's part is put along its whole way, while the hand stands still."""
    sim = Libero().simulator(suite, task_id)
    sim.reset(0)
    recorder, simulation = Libero().recorder(sim), sim.environment.sim
    model, data = simulation.model._model, simulation.data._data
    (goal,) = recorder.trajectory().goals
    assert goal.joint
    joint = model.joint(recorder.trajectory().parts[goal.joint.part].name).id
    for share in np.linspace(0, 1, 12):
        low, high = model.jnt_range[joint]
        data.qpos[model.jnt_qposadr[joint]] = low + share * (high - low)
        simulation.forward()
        sim.environment._check_success()
        recorder.note(np.array([0, 0, 0, 0, 0, 0, OPEN]))
    sim.close()
    return recorder.trajectory()


def measure() -> tuple[list[Diagnosis], dict[str, Trajectory]]:
    return [played(case) for case in CASES], {predicate: moved(*task) for predicate, task in PARTS.items()}


@pytest.fixture(scope="module")
def found() -> tuple[list[Diagnosis], dict[str, Trajectory]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure).result()


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.verdict for case in CASES])
def test_a_failure_made_on_purpose_gets_its_verdict(found: tuple[list[Diagnosis], Any], number: int) -> None:
    case, account = CASES[number], found[0][number]
    assert account.verdict == case.verdict, account.reason
    assert case.words in account.reason
    reached = {name: step for name, step in account.stages.items() if step is not None}
    assert tuple(reached) == case.stages and [*reached.values()] == sorted(reached.values())


@pytest.mark.parametrize("predicate", PARTS)
def test_a_parts_goal_is_reached_where_liberos_predicate_holds(
    found: tuple[Any, dict[str, Trajectory]], predicate: str
) -> None:
    trajectory = found[1][predicate]
    (goal,) = trajectory.goals
    assert goal.predicate == predicate and goal.joint
    there = goal.joint.left(trajectory.values[:, goal.joint.part]) < 0
    np.testing.assert_array_equal(there, trajectory.held[:, 0])
    assert not there.all() and there.any()
    assert trajectory.parts[goal.joint.part].hinge == predicate.startswith("turn")
