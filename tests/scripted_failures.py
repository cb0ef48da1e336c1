"""Failures made on purpose in the real simulator: for each verdict a script that earns it.

    python -m tests.scripted_failures [SCRIPT …]    plays all (or the functions named), prints what was found

Nothing is rendered. The hand follows the scripted expert, which is told another object or target, or is interrupted.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from prismatic.expert import Expert
from prismatic.simulator import Simulator, rollout
from prismatic.stages import MOVE_STAGES, PLACE_STAGES
from prismatic.verdicts import Account, account

Actions = Iterator[np.ndarray]
OPEN, CLOSE = 1.0, 0.0


class Hand(Expert):
    """The expert for any object and target of a scene, and a few plain motions."""

    def __init__(self, sim: Simulator, thing: str = "", target: str = "", *, inside: bool = False) -> None:
        self._sim, self._rounding, self._model = sim, 0.25, None
        self._object, self._target, self._inside = thing, target, inside
        self.shift = np.zeros(3)  # m, added to the target

    def _target_point(self, data: Any = None) -> np.ndarray:
        return super()._target_point(data) + self.shift

    def work(self, steps: int = 200, until: Callable[["Hand"], bool] = lambda hand: False) -> Actions:
        """What the expert would do."""
        for _ in range(steps):
            action = self(None, "")
            if until(self):
                return
            yield action

    def go(
        self,
        point: np.ndarray,
        gripper: float,
        *,
        by: tuple[float, float, float] = (0, 0, 0),
        steps: int = 60,
        speed: float = 1.0,
        until: Callable[["Hand"], bool] = lambda hand: False,
    ) -> Actions:
        """Straight to a point (3,) m in the world, moved `by` an offset."""
        point = point + np.array(by)
        for _ in range(steps):
            error = point - self.hand
            if np.linalg.norm(error) < 0.008 or until(self):
                return
            yield np.array([*np.clip(20 * error, -speed, speed), 0, 0, 0, gripper])

    def value(self, joint: str) -> float:
        """Of a drawer, door or knob: m or rad."""
        model = self._sim.environment.sim.model._model
        return float(self._sim.environment.sim.data._data.qpos[model.jnt_qposadr[model.joint(joint).id]])

    @property
    def hand(self) -> np.ndarray:
        environment = self._sim.environment
        return environment.sim.data._data.site_xpos[environment.robots[0].eef_site_id].copy()

    def place(self, name: str) -> np.ndarray:
        """(3,) of an object, a fixture's part or a region."""
        environment = self._sim.environment
        model, data = environment.sim.model._model, environment.sim.data._data
        if name in environment.obj_body_id:
            return data.xpos[environment.obj_body_id[name]].copy()
        return data.site_xpos[model.site(name).id].copy()


def still(gripper: float, steps: int) -> Actions:
    for _ in range(steps):
        yield np.array([0, 0, 0, 0, 0, 0, gripper])


def held(hand: Hand) -> bool:
    return hand._held()


class Script:
    """A policy that plays the actions of a generator, then stands still."""

    num_images = 0

    def __init__(self, sim: Simulator, play: Callable[[Simulator], Actions]) -> None:
        self._sim, self._play, self._gripper = sim, play, OPEN
        self._actions: Actions | None = None

    def __call__(self, frame: Any, instruction: str, wrist: Any = None) -> np.ndarray:
        if self._actions is None:
            self._actions = self._play(self._sim)
        action = next(self._actions, np.array([0, 0, 0, 0, 0, 0, self._gripper]))
        self._gripper = action[6]
        return action


# --- a bowl to be put on a plate ------------------------------------------------------------------------------------

BOWL, OTHER_BOWL, PLATE = "akita_black_bowl_1", "akita_black_bowl_2", "plate_1"


def solves(sim: Simulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work()


def idles(sim: Simulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work(10)
    yield from still(OPEN, 60)


def stays_away(sim: Simulator) -> Actions:
    hand = Hand(sim)
    start = hand.hand
    for _ in range(3):
        yield from hand.go(start, OPEN, by=(0, 0.1, 0.1))
        yield from hand.go(start, OPEN, by=(0, -0.1, 0.1))


def hovers(sim: Simulator) -> Actions:
    hand = Hand(sim)
    bowl = hand.place(BOWL)
    for _ in range(3):
        yield from hand.go(bowl, OPEN, by=(0, 0.04, 0.09))
        yield from hand.go(bowl, OPEN, by=(0, -0.04, 0.09))


def closes_beside(sim: Simulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(hand.place(BOWL), OPEN, by=(0, 0, 0.1))
    yield from still(CLOSE, 15)
    yield from still(OPEN, 10)
    yield from still(CLOSE, 15)


def pushes(sim: Simulator) -> Actions:
    hand = Hand(sim)
    bowl = hand.place(BOWL)
    yield from hand.go(bowl, CLOSE, by=(-0.11, 0, 0.15))
    yield from hand.go(bowl, CLOSE, by=(-0.11, 0, 0.03))
    yield from hand.go(bowl, CLOSE, by=(0.05, 0, 0.03))


def takes_the_other(sim: Simulator) -> Actions:
    yield from Hand(sim, OTHER_BOWL, PLATE).work(90)


def holds_without_lifting(sim: Simulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work(until=held)
    yield from still(CLOSE, 30)


def drops(sim: Simulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    yield from hand.work(until=held)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.15))
    yield from still(OPEN, 20)


def keeps_it(sim: Simulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    yield from hand.work(until=held)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.15))
    yield from still(CLOSE, 20)


def hangs_over_the_plate(sim: Simulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    hand.shift = np.array([0, 0, 0.1])
    for action in hand.work(120):
        action[6] = CLOSE if hand._held() else action[6]
        yield action


def puts_it_beside(sim: Simulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    hand.shift = np.array([-0.05, 0, 0])
    yield from hand.work(120)


def puts_it_elsewhere(sim: Simulator) -> Actions:
    yield from Hand(sim, BOWL, "flat_stove_1_cook_region").work(150)


# --- a knob, drawers, a microwave -----------------------------------------------------------------------------------

KNOB, TOP_DRAWER, LOW_DRAWER = "flat_stove_1_button", "wooden_cabinet_1_top_level", "white_cabinet_1_bottom_level"


def knob(hand: Hand) -> np.ndarray:
    """(3,) m, its middle."""
    model = hand._sim.environment.sim.model._model
    return hand._sim.environment.sim.data._data.xanchor[model.joint(KNOB).id] * np.array([1, 1, 0]) + np.array(
        [0, 0, 0.935]
    )


def turns(hand: Hand, angle: float, side: float = 1.0) -> Actions:
    """Push the knob's lever with shut fingers, to an angle (rad) beyond or, with side -1, short of the present one."""
    middle = knob(hand)
    yield from hand.go(middle, CLOSE, by=(0.035, -0.07 * side, 0.12), steps=90)
    yield from hand.go(middle, CLOSE, by=(0.035, -0.07 * side, 0.0))
    far = (0.035, 0.1 * side, 0.0)
    yield from hand.go(middle, CLOSE, by=far, speed=0.3, until=lambda hand: side * (hand.value(KNOB) - angle) > 0)
    yield from hand.go(hand.hand, CLOSE, by=(0, -0.03 * side, 0.0))
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.12))


def turns_it_on(sim: Simulator) -> Actions:
    yield from turns(Hand(sim), 0.6)


def turns_a_little(sim: Simulator) -> Actions:
    yield from turns(Hand(sim), 0.2)


def turns_on_and_off(sim: Simulator) -> Actions:
    hand = Hand(sim)
    yield from turns(hand, 0.6)
    yield from turns(hand, 0.3, side=-1.0)


def hovers_over_the_knob(sim: Simulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(knob(hand), OPEN, by=(0, 0, 0.12))
    for _ in range(2):
        yield from hand.go(knob(hand), OPEN, by=(0, 0.03, 0.055))
        yield from hand.go(knob(hand), OPEN, by=(0, -0.03, 0.055))


def taps_the_knob(sim: Simulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(knob(hand), CLOSE, by=(0, 0, 0.12))
    yield from hand.go(knob(hand), CLOSE, steps=20)
    yield from hand.go(knob(hand), CLOSE, by=(0, 0, 0.12))


def pulls_the_top_drawer(sim: Simulator) -> Actions:
    """By 5 cm; its handle is 11 cm before the middle of the region inside."""
    hand = Hand(sim)
    model, data = sim.environment.sim.model._model, sim.environment.sim.data._data
    geoms = [g for g in range(model.ngeom) if model.geom_bodyid[g] == model.jnt_bodyid[model.joint(TOP_DRAWER).id]]
    front = data.geom_xpos[geoms][:, 1].max()
    handle = data.geom_xpos[next(g for g in geoms if data.geom_xpos[g, 1] == front)]
    yield from hand.go(handle, OPEN, by=(0, 0.0, 0.12), steps=80)
    yield from hand.go(handle, OPEN, steps=40, speed=0.5)
    yield from still(CLOSE, 8)
    yield from hand.go(handle, CLOSE, by=(0, 0.15, 0), speed=0.4, until=lambda hand: hand.value(TOP_DRAWER) < -0.05)
    yield from still(OPEN, 8)


def pushes_the_low_drawer(sim: Simulator, until: float = -0.06) -> Actions:
    hand = Hand(sim)
    front = hand.place("white_cabinet_1_bottom_region") - np.array([0, 0.17, 0])
    yield from hand.go(front, CLOSE, by=(0, 0, 0.15), steps=90)
    yield from hand.go(front, CLOSE)
    far = (0, 0.3, 0)
    yield from hand.go(front, CLOSE, by=far, steps=90, speed=0.5, until=lambda hand: hand.value(LOW_DRAWER) > until)
    yield from hand.go(hand.hand, CLOSE, by=(0, -0.05, 0))


def shuts_the_low_drawer(sim: Simulator) -> Actions:
    yield from pushes_the_low_drawer(sim, until=1.0)


def puts_it_on_the_microwave(sim: Simulator) -> Actions:
    yield from Hand(sim, "white_yellow_mug_1", "microwave_1_top_side").work(150)


@dataclass(frozen=True)
class Case:
    verdict: str
    suite: str
    task_id: int
    play: Callable[[Simulator], Actions]
    steps: int
    words: str = ""  # that the sentence must contain
    stages: tuple[str, ...] | None = None  # that it reaches; where they are named, pytest plays it, too


CASES = [
    Case("success", "libero_spatial", 0, solves, 100),
    Case("idle", "libero_spatial", 0, idles, 80, "Stood still for the last"),
    Case("never_near", "libero_spatial", 0, stays_away, 60),
    Case("never_grasped", "libero_spatial", 0, hovers, 60),
    Case("closed_beside", "libero_spatial", 0, closes_beside, 90, "2 times", ("approached",)),
    Case("pushed_away", "libero_spatial", 0, pushes, 110),
    Case("wrong_object", "libero_spatial", 0, takes_the_other, 80, "black bowl 2 instead of", ()),
    Case("not_lifted", "libero_spatial", 0, holds_without_lifting, 60),
    Case("dropped", "libero_spatial", 0, drops, 80, "gripper opened", PLACE_STAGES[:4]),
    Case("not_carried", "libero_spatial", 0, keeps_it, 80),
    Case("never_released", "libero_spatial", 0, hangs_over_the_plate, 100, "over the plate", PLACE_STAGES[:5]),
    Case("beside_target", "libero_spatial", 0, puts_it_beside, 110),
    Case("wrong_target", "libero_spatial", 0, puts_it_elsewhere, 150, "rests on the flat stove"),
    Case("success", "libero_goal", 7, turns_it_on, 150),
    Case("not_turned_enough", "libero_goal", 7, turns_a_little, 150, "degrees"),
    Case("never_touched", "libero_goal", 7, hovers_over_the_knob, 90),
    Case("not_moved", "libero_goal", 7, taps_the_knob, 90),
    Case("wrong_part", "libero_goal", 7, pulls_the_top_drawer, 200, "Moved the wooden cabinet top level"),
    Case("not_open_enough", "libero_goal", 3, pulls_the_top_drawer, 200, "14.0 cm"),
    Case("success", "libero_90", 22, shuts_the_low_drawer, 200),
    Case("not_closed_enough", "libero_90", 22, pushes_the_low_drawer, 200, "bottom", MOVE_STAGES[:3]),
    Case("undone", "libero_10", 2, turns_on_and_off, 250, "0 of 2 goals"),
    Case("never_held", "libero_10", 9, puts_it_on_the_microwave, 150, "above"),
]


def run(cases: list[Case]) -> Iterator[tuple[Case, Account]]:
    """Play them; cases of the same task share a simulator."""
    sim: Simulator | None = None
    for case in cases:
        if sim is None or (sim.suite, sim.task_id) != (case.suite, case.task_id):
            if sim:
                sim.close()
            sim = Simulator(case.suite, case.task_id)
        episode = rollout(sim, Script(sim, case.play), init_state=0, max_steps=case.steps)
        assert episode.signals, episode.error
        yield case, account(episode.signals, success=episode.success)
    if sim:
        sim.close()


if __name__ == "__main__":
    for case, found in run([case for case in CASES if case.play.__name__ in sys.argv[1:] or not sys.argv[1:]]):
        stages = " ".join(f"{name} {step}" for name, step in found.stages.items() if step is not None)
        right = found.verdict == case.verdict and case.words in found.reason
        print(
            f"{'' if right else 'WRONG: '}{case.verdict}: {found.verdict}: {found.reason}\n    {case.suite} {case.task_id}: {stages}",
            flush=True,
        )
