"""LIBERO's simulator as a policy meets it: a task and an initial state in; upright frames, the robot's state and success out.

Non-obvious behaviors
- Nothing is rendered until `frame()` or `wrist()` is called: a step costs 7 ms, a frame 30-90 ms on a CPU core.
- A frame shows the moment at which LIBERO's own environment samples its cameras, a physics step or two (2 ms each)
  before a control step ends: it is pixel-equal to `OffScreenRenderEnv`'s `agentview_image`, turned by 180 degrees.
- `reset(i)` seeds NumPy's *global* generator with `env_seed` (LIBERO has no other), rebuilds the model, restores stored state i, then holds still
  for `settle` steps that count for nothing. The seed places the fixtures (cabinet, stove), which a stored state does not contain. An episode is
  independent of those before it: it is seeded, and LIBERO's samplers of opened drawers, which draw first and which every reset adds once more,
  are those of a new environment.
- Actions come in the policy's convention (gripper 1 open, 0 close); LIBERO's is -1 open, +1 close.
- Success is LIBERO's `done`. It can hold for one step only (a bowl sliding across the plate), and it ends the episode.
- `quality="fast"` (no anti-aliasing, no reflections, fewer triangles) renders seven times faster on a CPU and changes pixels by about 2 of 255: for
  demonstrations and demos, never for a score to be compared with others.
- Every reset begins with a new model (robosuite's hard reset). A soft one would place what belongs on a fixture by where that fixture stood an
  episode ago: a bowl falls beside its cabinet. What MuJoCo compiled is kept and copied, half a second faster: a scene's XML is always the same.
  The renderer is kept too: it holds meshes and textures, and takes a second to make.
- The state's axis-angle is LIBERO's own: an angle from 0 to 2π, the quaternion's sign as MuJoCo gives it. Policies learnt with that.
- scene/renderer.py chooses the renderer, and must have done so before the first simulator is built.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from prismatic.errors import ConfigError, PolicyError
from prismatic.meshes import fewer_triangles
from prismatic.robosuite_tamed import tamed

SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # LIBERO's convention: hold still, fingers open
RESOLUTION = 256  # pixels a side, as the data sets were rendered
FRONT, WRIST = "agentview", "robot0_eye_in_hand"
# The parts of MuJoCo's state that an image and the robot's state are made of.
SCENE_FIELDS = (
    "qpos", "xpos", "xquat", "xmat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task's files: scene and goal (BDDL), and the stored initial states (N, state size) float64."""

    suite: str
    task_id: int
    instruction: str
    bddl_file: Path
    init_states: np.ndarray


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(4,) quaternion x y z w → (3,) axis times angle, rad, angle 2·acos(w) from 0 to 2π: the sign is not flipped for w < 0."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    if (sine := np.sqrt(1.0 - w * w)) == 0.0:
        return np.zeros(3)
    return quaternion[:3] * (2.0 * np.arccos(w)) / sine


class LiberoSimulator:
    """One LIBERO task in robosuite. quality: "standard" (LIBERO's own pixels) or "fast"."""

    def __init__(self, task: Task, *, env_seed: int = 0, quality: str = "standard") -> None:
        if quality not in ("standard", "fast"):
            raise ConfigError(f"unknown render quality {quality!r} (render_quality): use standard or fast")
        self.task, self.suite, self.task_id = task, task.suite, task.task_id
        self.env_seed, self.instruction, self.quality = env_seed, task.instruction, quality
        self._seen_model: Any = None
        self._seen: Any = None
        self._context: Any = None
        self._env = self._make_env()
        self._samplers = tuple(self.environment.object_property_initializers)

    def _make_env(self) -> Any:
        with tamed():
            from libero.libero.envs.env_wrapper import ControlEnv
            from robosuite.utils.observables import Observable, sensor

        # Without camera observations nothing renders by itself, and without LIBERO's own context ours is made on
        # demand, after the quality is set. No horizon: the caller counts the steps.
        environment = ControlEnv(
            str(self.task.bddl_file), use_camera_obs=False, has_offscreen_renderer=False, ignore_done=True
        )
        for name in environment.env.observation_names:
            environment.env.modify_observable(name, "enabled", False)

        @sensor(modality="image")
        def scene(obs_cache: dict) -> float:
            self._remember_scene(environment.sim)
            return 0.0

        # robosuite's own sampling decides when: at the very physics step at which it would have read a camera.
        environment.env.add_observable(Observable("scene", sensor=scene, sampling_rate=environment.env.control_freq))
        return environment

    def _remember_scene(self, sim: Any) -> None:
        import mujoco

        if self._seen_model is not sim.model._model:
            self._seen_model = sim.model._model
            self._seen = mujoco.MjData(sim.model._model)  # pyright: ignore[reportAttributeAccessIssue]
        for name in SCENE_FIELDS:
            getattr(self._seen, name)[:] = getattr(sim.data._data, name)

    @property
    def environment(self) -> Any:
        """robosuite's environment itself, for privileged readers such as the scripted expert."""
        return self._env.env

    def reset(self, init_state: int | np.ndarray | None, *, seed: int | None = None, settle: int = 10) -> None:
        """Start an episode from a stored state (its number), from a given one (as Task.init_states has them), or
        (init_state None) from a randomised one drawn from `seed`.
        """
        state = self._stored_state(init_state) if isinstance(init_state, int) else init_state
        if state is None and seed is None:
            raise ValueError("a randomised reset needs a seed")
        # with the renderer the only ones that would hold the scene before, 250 MB, while the next is made
        self._seen_model = self._seen = None
        if self._context is not None:
            self._context.sim = self._context.model = self._context.data = None
        self.environment.object_property_initializers = [*self._samplers]
        self._env.seed(seed if state is None else self.env_seed)
        self._env.reset()
        if state is not None:
            self._env.set_init_state(state)
        for _ in range(settle):
            self._env.step(np.array(SETTLE_ACTION))

    def _stored_state(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self.task.init_states):
            raise ConfigError(
                f"task {self.task_id} of {self.suite} has no stored state {number} (num_trials_per_task, "
                f"first_init_state): its states are 0 to {len(self.task.init_states) - 1}"
            )
        return self.task.init_states[number]

    def step(self, action: np.ndarray) -> bool:
        """One control step (1/20 s). action: (7,), gripper 1 open … 0 close. Returns whether the task is solved now."""
        command = np.array(action, dtype=np.float64)
        if command.shape != (7,) or not np.isfinite(command).all():
            raise PolicyError(f"an action is 7 finite numbers, got {action}")
        command[6] = -np.sign(2 * command[6] - 1)
        return bool(self._env.step(command)[2])

    def frame(self) -> np.ndarray:
        """What the camera in front of the robot sees: (256, 256, 3) uint8, upright."""
        return self._render(FRONT)

    def wrist(self) -> np.ndarray:
        """What the camera on the hand sees: (256, 256, 3) uint8, turned as in the data sets."""
        return self._render(WRIST)

    def moment(self) -> list[np.ndarray]:
        """What `frame`, `wrist` and `state` show now, for `show` later in this episode: whoever keeps moments draws only what is used."""
        return [array.copy() for array in self._drawn()]

    def show(self, moment: list[np.ndarray]) -> None:
        """Let `frame`, `wrist` and `state` show an earlier moment until the next step."""
        for array, value in zip(self._drawn(), moment, strict=True):
            array[:] = value

    def _drawn(self) -> list[np.ndarray]:
        return [*(getattr(self._seen, name) for name in SCENE_FIELDS), self._seen_model.site_rgba]  # a lit burner

    def _render(self, camera: str) -> np.ndarray:
        sim: Any = self.environment.sim
        context = self._context = self._context or self._make_render_context(sim)
        if sim._render_context_offscreen is not context:  # a reset has built another model since
            context.sim, context.model = sim, sim.model
            sim.add_render_context(context)
        context.gl_ctx.make_current()  # another simulator of this process may have rendered since
        context.data = SimpleNamespace(_data=self._seen)
        pixels = sim.render(camera_name=camera, width=RESOLUTION, height=RESOLUTION)
        return np.ascontiguousarray(pixels[::-1, ::-1])

    def _make_render_context(self, sim: Any) -> Any:
        import mujoco
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        fast, model = self.quality == "fast", sim.model._model
        model.vis.quality.shadowsize *= int(model.light_castshadow.any())  # 64 MB; LIBERO's lights cast none
        if fast:
            model.vis.quality.offsamples = 0
        with tamed(), fewer_triangles(model) if fast else contextlib.nullcontext():
            context = MjRenderContextOffscreen(sim, device_id=-1)
        context.vopt.geomgroup[:2] = 0, 1  # collision shapes; what is meant to be seen
        if fast:
            context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0  # pyright: ignore[reportAttributeAccessIssue]
        return context

    def state(self) -> np.ndarray:
        """(8,) float32: hand position 3 (m), axis-angle 3 (rad), fingers 2 (m), at the moment that `frame` shows."""
        robot, seen = self.environment.robots[0], self._seen
        hand = self._seen_model.body(robot.robot_model.eef_name).id
        turn = axis_angle(np.roll(seen.xquat[hand], -1))  # MuJoCo's w comes first
        fingers = seen.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([seen.site_xpos[robot.eef_site_id], turn, fingers]).astype(np.float32)

    def joint_angles(self) -> np.ndarray:
        """(7,) float32, rad, at the same moment."""
        return self._seen.qpos[self.environment.robots[0]._ref_joint_pos_indexes].astype(np.float32)

    def places(self) -> dict[str, np.ndarray]:
        """Where every object and fixture of the task is now: name → (3,) m and (4,) quaternion in one."""
        data = self.environment.sim.data._data
        bodies = self.environment.obj_body_id
        return {name: np.concatenate([data.xpos[body], data.xquat[body]]) for name, body in bodies.items()}

    def close(self) -> None:
        """Free the model and the renderer."""
        self._context = None
        self._env.close()
