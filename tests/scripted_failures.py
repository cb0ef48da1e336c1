"""Failures made on purpose in the real simulator: for each verdict a script that earns it.

    python -m tests.scripted_failures [WORD …]    plays all (or those whose name has such a word), prints what was found

Nothing is rendered; all take a few minutes of one core. Exit code 1 where a verdict, or what its sentence must say, is another
than expected. The hand follows the scripted expert, which is told another object or target, or is interrupted.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from prismatic.rollout import rollout
from prismatic.scene.diagnosis import Diagnosis, diagnose
from prismatic.scene.suites import Libero
from prismatic.scene.trajectory import MOVE_STAGES, PLACE_STAGES
from prismatic.simulator import LiberoSimulator
from tests.scripted_hand import CLOSE, OPEN, Actions, Hand, Script, held, still

BOWL, OTHER_BOWL, PLATE = "akita_black_bowl_1", "akita_black_bowl_2", "plate_1"
KNOB, ARM = "flat_stove_1_button", 0.035  # m from the knob's axis at which its lever is pushed
SOUP, SAUCE, BASKET = "alphabet_soup_1", "tomato_sauce_1", "basket_1_contain_region"
TOP, WHITE_TOP, WHITE_LOW = "wooden_cabinet_1_top_level", "white_cabinet_1_top_level", "white_cabinet_1_bottom_level"

# --- an object ------------------------------------------------------------------------------------------------------


def puts(sim: LiberoSimulator, thing: str, where: str, *, steps: int = 150, shift: Any = 0.0, **how: Any) -> Actions:
    """As the expert would, with the target moved by `shift` (m)."""
    hand = Hand(sim, thing, where, **how)
    hand.shift = np.zeros(3) + shift
    yield from hand.work(steps)


def idles(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work(10)
    yield from still(OPEN, 60)


def stays_away(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    start = hand.hand
    for _ in range(3):
        yield from hand.go(start, OPEN, by=(0, 0.1, 0.1))
        yield from hand.go(start, OPEN, by=(0, -0.1, 0.1))


def hovers(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    bowl = hand.place(BOWL)
    for _ in range(3):
        yield from hand.go(bowl, OPEN, by=(0, 0.04, 0.09))
        yield from hand.go(bowl, OPEN, by=(0, -0.04, 0.09))


def closes_beside(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(hand.place(BOWL), OPEN, by=(0, 0, 0.1))
    yield from still(CLOSE, 15)
    yield from still(OPEN, 10)
    yield from still(CLOSE, 15)


def pushes(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    bowl = hand.place(BOWL)
    for by in ((-0.11, 0, 0.15), (-0.11, 0, 0.03), (0.05, 0, 0.03)):
        yield from hand.go(bowl, CLOSE, by=by)


def takes(
    sim: LiberoSimulator, thing: str, where: str, *, lift: bool, wait: int, gripper: float = CLOSE, **how: Any
) -> Actions:
    """Grasp a thing, perhaps lift it, and stay there with the gripper open or closed."""
    hand = Hand(sim, thing, where, **how)
    yield from hand.work(until=held)
    if lift:
        yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.15))
    yield from still(gripper, wait)


def hangs_over_the_plate(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim, BOWL, PLATE)
    hand.shift = np.array([0, 0, 0.1])
    for action in hand.work(120):
        action[6] = CLOSE if hand._held() else action[6]
        yield action


def then(sim: LiberoSimulator, second: Callable[[LiberoSimulator], Actions]) -> Actions:
    """The soup into the basket, then something else."""
    yield from Hand(sim, SOUP, BASKET, inside=True).work(150, until=lambda hand: hand._placed() and not hand._held())
    yield from second(sim)


# --- a knob, drawers ------------------------------------------------------------------------------------------------


def knob(hand: Hand) -> np.ndarray:
    """(3,) m: on the knob's axis, where shut fingers reach the lever and not the disc below."""
    model = hand._sim.environment.sim.model._model
    anchor = hand._sim.environment.sim.data._data.xanchor[model.joint(KNOB).id]
    return anchor + np.array([0, 0, 0.03])


def turns(sim: LiberoSimulator, until: float, side: float = 1.0, speed: float = 1.0) -> Actions:
    """Push the lever with shut fingers until its angle (rad) is beyond or, with side -1, short of `until`.

    The hand turns with it: its friction would hold the lever. Let go, the lever turns on for a while.
    """
    hand = Hand(sim)
    middle, angle = knob(hand), hand.value(KNOB)
    lever, across = ring(angle)
    start = middle + ARM * lever - 0.06 * side * across
    yield from hand.go(start, CLOSE, by=(0, 0, 0.12), steps=90, yaw=np.pi / 2 + angle)
    yield from hand.go(start, CLOSE)
    for _ in range(120):
        if side * (hand.value(KNOB) - until) > 0:
            break
        lever, across = ring(hand.value(KNOB))
        away = hand.hand - middle
        push = side * speed * across + 20 * (ARM - away @ lever) * lever - np.array([0, 0, 20 * away[2]])
        turn = np.pi / 2 + hand.value(KNOB) - hand.yaw  # the finger axis stays across the lever
        yield np.array([*np.clip(push, -1, 1), 0, 0, np.clip(4 * turn, -1, 1), CLOSE])
    yield from hand.go(hand.hand - 0.04 * side * across, CLOSE)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.12))


def ring(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (3,) along the lever and across it, the way the angle grows."""
    return np.array([np.cos(angle), np.sin(angle), 0]), np.array([-np.sin(angle), np.cos(angle), 0])


def turns_on_and_off(sim: LiberoSimulator) -> Actions:
    yield from turns(sim, 0.6)
    yield from turns(sim, 0.3, side=-1.0)


def hovers_over_the_knob(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(knob(hand), OPEN, by=(0, 0, 0.12))
    for _ in range(2):
        yield from hand.go(knob(hand), OPEN, by=(0, 0.03, 0.055))
        yield from hand.go(knob(hand), OPEN, by=(0, -0.03, 0.055))


def taps_the_knob(sim: LiberoSimulator) -> Actions:
    hand = Hand(sim)
    yield from hand.go(knob(hand), CLOSE, by=(0, 0, 0.12))
    yield from hand.go(knob(hand), CLOSE, by=(0, 0, 0.012), steps=40, speed=0.3)
    yield from hand.go(knob(hand), CLOSE, by=(0, 0, 0.12))


def drags(sim: LiberoSimulator, drawer: str, until: float) -> Actions:
    """Shut fingers press on the bar of a drawer's handle, and drag it open until its value (m) is below `until`."""
    hand = Hand(sim)
    yield from hand.go(hand.handle(drawer), CLOSE, by=(0, 0, 0.1), steps=90)
    yield from hand.go(hand.handle(drawer), CLOSE, by=(0, 0, 0.03), steps=30)
    for _ in range(150):
        if hand.value(drawer) < until:
            break
        away = hand.hand - hand.handle(drawer)
        drag = 0.25 if away[2] < 0.025 and away[1] < 0.006 else -20 * min(away[1], 0.25)
        yield np.array([np.clip(-20 * away[0], -1, 1), drag, -0.4, 0, 0, 0, CLOSE])
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.1))


def shoves(sim: LiberoSimulator, drawer: str, until: float) -> Actions:
    """Shut fingers push against a drawer's handle until its value (m) is above `until`."""
    hand = Hand(sim)
    inward = np.array([0, np.sign(hand.handle(drawer)[1]), 0])
    front = hand.handle(drawer) - 0.06 * inward + np.array([0, 0, 0.015])  # the palm clears the cabinet
    yield from hand.go(front, CLOSE, by=(0, 0, 0.15), steps=90)
    yield from hand.go(front, CLOSE)
    beyond = front + 0.3 * inward
    yield from hand.go(beyond, CLOSE, steps=90, speed=0.5, until=lambda hand: hand.value(drawer) > until)
    yield from hand.go(hand.hand - 0.05 * inward, CLOSE)


def takes_the_bowl(sim: LiberoSimulator) -> Actions:
    yield from Hand(sim, BOWL, PLATE).work(until=held)
    yield from still(CLOSE, 2)
    hand = Hand(sim)
    yield from hand.go(hand.hand, CLOSE, by=(0, 0, 0.15))


@dataclass(frozen=True)
class Case:
    verdict: str
    suite: str
    task_id: int
    play: Callable[[LiberoSimulator], Actions]
    steps: int
    words: str = ""  # that the sentence must contain
    stages: tuple[str, ...] | None = None  # that it reaches; where they are named, pytest plays it, too

    @property
    def name(self) -> str:
        """The script and what it is told."""
        if isinstance(self.play, partial):
            told = [*self.play.args, *(f"{name}={value}" for name, value in self.play.keywords.items())]
            return f"{self.play.func.__name__}({', '.join(map(str, told))})"
        return self.play.__name__


soup, sauce = (
    partial(puts, thing=SOUP, where=BASKET, inside=True),
    partial(puts, thing=SAUCE, where=BASKET, inside=True),
)
bowl = partial(takes, thing=BOWL, where=PLATE)
CASES = [
    Case("success", "libero_spatial", 0, partial(puts, thing=BOWL, where=PLATE), 100),
    Case("idle", "libero_spatial", 0, idles, 80, "Stood still for the last"),
    Case("never_near", "libero_spatial", 0, stays_away, 60),
    Case("never_grasped", "libero_spatial", 0, hovers, 60),
    Case("closed_beside", "libero_spatial", 0, closes_beside, 90, "2 times", ("approached",)),
    Case("pushed_away", "libero_spatial", 0, pushes, 110),
    Case("wrong_object", "libero_spatial", 0, partial(puts, thing=OTHER_BOWL, where=PLATE, steps=90), 80, "black bowl 2 instead of", ()),
    Case("not_lifted", "libero_spatial", 0, partial(bowl, lift=False, wait=30), 60),
    Case("dropped", "libero_spatial", 0, partial(bowl, lift=True, wait=20, gripper=OPEN), 80, "gripper opened", PLACE_STAGES[:4]),
    Case("not_carried", "libero_spatial", 0, partial(bowl, lift=True, wait=20), 80),
    Case("never_released", "libero_spatial", 0, hangs_over_the_plate, 100, "over the plate", PLACE_STAGES[:5]),
    Case("beside_target", "libero_spatial", 0, partial(puts, thing=BOWL, where=PLATE, shift=(-0.05, 0, 0), steps=120), 110),
    Case("wrong_target", "libero_spatial", 0, partial(puts, thing=BOWL, where="flat_stove_1_cook_region"), 150, "rests on the flat stove"),
    Case("success", "libero_object", 0, soup, 150),
    Case("wrong_object", "libero_object", 0, sauce, 120, "tomato sauce instead of the alphabet soup"),
    Case("success", "libero_goal", 7, partial(turns, until=0.6), 150),
    Case("not_turned_enough", "libero_goal", 7, partial(turns, until=0.05, speed=0.3), 150, "degrees"),
    Case("never_touched", "libero_goal", 7, hovers_over_the_knob, 90),
    Case("not_moved", "libero_goal", 7, taps_the_knob, 90),
    Case("never_near", "libero_goal", 7, stays_away, 60),
    Case("success", "libero_90", 39, partial(turns, until=-0.003, side=-1.0), 200),
    Case("not_turned_enough", "libero_90", 39, partial(turns, until=0.85, side=-1.0, speed=0.5), 200),
    Case("wrong_part", "libero_goal", 0, partial(drags, drawer=TOP, until=-0.05), 120, "Moved the wooden cabinet top level"),
    Case("wrong_object", "libero_goal", 0, takes_the_bowl, 90, "Lifted the akita black bowl and never touched"),
    Case("idle", "libero_goal", 0, idles, 80, "Stood still for the last"),
    Case("not_open_enough", "libero_goal", 3, partial(drags, drawer=TOP, until=-0.05), 120, "14.0 cm"),
    Case("not_open_enough", "libero_goal", 3, partial(puts, thing=BOWL, where="wooden_cabinet_1_top_side", steps=200), 150,
         "by 14.0 cm; it got 0.0 cm far"),
    Case("not_open_enough", "libero_90", 7, partial(drags, drawer=TOP, until=-0.05), 120, "", MOVE_STAGES[:3]),
    Case("success", "libero_90", 7, partial(drags, drawer=TOP, until=-0.155), 200),
    Case("success", "libero_90", 28, partial(shoves, drawer=WHITE_TOP, until=1.0), 200),
    Case("not_closed_enough", "libero_90", 28, partial(shoves, drawer=WHITE_TOP, until=-0.05), 200, "top"),
    Case("not_closed_enough", "libero_90", 22, partial(shoves, drawer=WHITE_LOW, until=-0.08), 120, "bottom"),
    Case("undone", "libero_10", 2, turns_on_and_off, 130, "0 of 2 goals"),
    Case("success", "libero_10", 0, partial(then, second=partial(sauce, steps=200)), 350),
    Case("never_near", "libero_10", 0, soup, 100, "1 of 2 goals"),
    Case("dropped", "libero_10", 0, partial(then, second=partial(takes, thing=SAUCE, where=BASKET, inside=True, lift=True, wait=20, gripper=OPEN)),
         300, "1 of 2 goals"),
    Case("never_held", "libero_10", 9, partial(puts, thing="white_yellow_mug_1", where="microwave_1_top_side", rim=(0.0, 0.068), steps=200),
         200, "above"),
]  # fmt: skip


def run(cases: list[Case]) -> Iterator[tuple[Case, Diagnosis]]:
    """Play them; cases of the same task share a simulator."""
    sim: LiberoSimulator | None = None
    for case in cases:
        if sim is None or (sim.suite, sim.task_id) != (case.suite, case.task_id):
            if sim:
                sim.close()
            sim = Libero().simulator(case.suite, case.task_id)
        recorder = partial(Libero().recorder, sim)
        episode = rollout(sim, Script(sim, case.play), init_state=0, max_steps=case.steps, recorder=recorder)
        assert episode.trajectory, episode.error
        yield case, diagnose(episode.trajectory, success=episode.success)
    if sim:
        sim.close()


if __name__ == "__main__":
    wrong = 0
    for case, found in run(
        [case for case in CASES if not sys.argv[1:] or any(word in case.name for word in sys.argv[1:])]
    ):
        right = found.verdict == case.verdict and case.words in found.reason
        wrong += not right
        stages = " ".join(f"{name} {step}" for name, step in found.stages.items() if step is not None)
        print(f"{'' if right else f'WRONG, not {case.verdict}: '}{found.verdict}: {found.reason}")
        print(f"    {case.suite} {case.task_id}, {case.name}: {stages}", flush=True)
    print(f"{wrong} verdicts are wrong" if wrong else "every verdict is as expected")
    sys.exit(bool(wrong))
