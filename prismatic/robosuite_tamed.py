"""What robosuite does to a process, and costs at each reset, undone: a leaf that simulator.py stands on."""

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def tamed() -> Iterator[None]:
    """Within it no CUDA_VISIBLE_DEVICES, which robosuite would take for EGL's device number, or refuse to start over. What lasts: private macros (no
    log file in the shared temporary folder, the first user's, and no warnings); and a scene is compiled once and copied for each episode, as
    what is compiled is always the same, and more than half a second of work.
    """
    macros = ModuleType("robosuite.macros_private")
    macros.__dict__.update(FILE_LOGGING_LEVEL=None, CONSOLE_LOGGING_LEVEL="ERROR")
    sys.modules.setdefault(macros.__name__, macros)
    visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        from robosuite.utils.binding_utils import MjSim

        MjSim.from_xml_string = staticmethod(lambda xml: MjSim(copy.copy(compiled(xml))))
        yield
    finally:
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


@functools.lru_cache(maxsize=1)  # 250 MB
def compiled(xml: str) -> object:
    """MuJoCo's model of a scene, never to be changed."""
    import mujoco

    read = mujoco.MjModel.from_xml_string  # pyright: ignore[reportAttributeAccessIssue]
    model, _ = read(xml), read("<mujoco/>")  # MuJoCo holds what it read last: of a scene 180 MB of textures
    return model
