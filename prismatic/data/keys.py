"""Which field of a data set is the agent view, the wrist view, the state, the action, the instruction: found by its usual name, or told.

`--data_keys image=observation.images.top,wrist=none,action=action/xyz+action/gripper` tells any of them; `+` joins vectors, `none` leaves a
wrist view or a state out. A field is named in full, or by its last part where that is unambiguous.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prismatic.errors import ConfigError

FLAG = "--data_keys"
OPTIONAL = ("wrist", "state")
KINDS = {"image": "camera", "wrist": "camera", "state": "vector", "action": "vector", "instruction": "text"}
# The usual names (the last part of a field's), the likeliest first.
USUAL = {
    "image": """image agentview_image agentview_rgb agentview image_primary front top main base rgb cam_high
        exterior_image_1_left image_0 rgb_static front_image top_image""",
    "wrist": """wrist_image image2 wrist image_wrist eye_in_hand_rgb robot0_eye_in_hand_image wrist_image_left hand_image
        wrist_rgb rgb_gripper cam_wrist""",
    "state": "state proprio robot_state qpos",
    "action": "action actions",
    "instruction": """language_instruction natural_language_instruction instruction task language prompt
        language_text""",
}
# Parts of an action that is a dictionary, in the order in which they make a vector; the last is part of a gripper's name.
ACTION_PARTS = ("world_vector|xyz|translation|position", "rotation_delta|rotation|rpy", ".*grip.*")


class DataKeys(NamedTuple):
    """Full names of fields. state and action are joined of one or more; an instruction may be none (LeRobot keeps it elsewhere)."""

    image: str
    wrist: str | None
    state: tuple[str, ...]
    action: tuple[str, ...]
    instruction: str | None

    @property
    def views(self) -> list[str]:
        """The cameras that are read: one or two."""
        return [self.image, *([self.wrist] if self.wrist else [])]


def parse_data_keys(text: str) -> dict[str, str]:
    """What --data_keys tells, per role; ConfigError for anything else than role=field."""
    told: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, _, name = (piece.strip() for piece in part.partition("="))
        if not name or role not in KINDS or (name == "none" and role not in OPTIONAL):
            raise ConfigError(
                f"{FLAG} {part!r} says nothing: write {FLAG} image=…,wrist=…,state=…,action=…,instruction=…"
            )
        told[role] = name
    return told


def find_keys(fields: Mapping[str, Sequence[str]], told: Mapping[str, str], where: str) -> DataKeys:
    """Choose among a data set's fields: per kind ("camera", "vector", "text"), full names. ConfigError names what is missing and what is there."""
    chosen: dict[str, tuple[str, ...]] = {}
    for role, kind in KINDS.items():
        there = fields.get(kind, ())
        if role in told:
            names = [] if told[role] == "none" else told[role].split("+")
            chosen[role] = tuple(_named(name.strip(), there, role, where) for name in names)
        else:
            chosen[role] = _usual(role, there)
    if not chosen["image"]:
        others = tuple(name for name in fields.get("camera", ()) if name not in chosen["wrist"])
        chosen["image"] = others if len(others) == 1 else ()
    if "wrist" not in told and chosen["wrist"] == chosen["image"]:
        chosen["wrist"] = ()
    needed = ("image", "action", *(["instruction"] if "text" in fields else []))
    missing = [role for role in needed if not chosen[role]]
    if missing:
        there = "; ".join(
            f"for {role} there are {', '.join(fields.get(KINDS[role], ())) or 'none'}" for role in missing
        )
        tell = ",".join(f"{role}=…" for role in missing)
        raise ConfigError(f"{where} lacks a usual name of {' and '.join(missing)} ({there}): give {FLAG} {tell}")
    for role in ("image", "wrist", "instruction"):
        if len(chosen[role]) > 1:
            raise ConfigError(f"{FLAG} {role}= names {len(chosen[role])} fields of {where}: give one")
    image, wrist, instruction = (next(iter(chosen[role]), None) for role in ("image", "wrist", "instruction"))
    return DataKeys(str(image), wrist, chosen["state"], chosen["action"], instruction)


def sentences(keys: DataKeys) -> list[str]:
    """What was chosen, for people."""
    return [
        f"image: {keys.image}",
        f"wrist: {keys.wrist or 'none'}",
        f"state: {' + '.join(keys.state) or 'none'}",
        f"action: {' + '.join(keys.action)}",
        f"instruction: {keys.instruction or 'the task of each row'}",
    ]


def _last(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _named(name: str, there: Sequence[str], role: str, where: str) -> str:
    found = [name] if name in there else [full for full in there if _last(full) == name or full.endswith(f"/{name}")]
    if len(found) != 1:
        listed = ", ".join(there) or "none"
        raise ConfigError(
            f"{FLAG} {role}={name}: {where} has {len(found)} fields of that name (there are: {listed}): give one of them"
        )
    return found[0]


def _usual(role: str, there: Sequence[str]) -> tuple[str, ...]:
    """The field of the likeliest name; an action that is a dictionary is joined of its parts, if each of them is known and there."""
    for name in USUAL[role].split():
        for full in there:
            if _last(full) == name:
                return (full,)
    parts = [name for name in there if name.startswith("action/")] if role == "action" else []
    ordered = [name for pattern in ACTION_PARTS for name in parts if re.fullmatch(pattern, _last(name))]
    return tuple(ordered) if len(parts) == len(ordered) == len(ACTION_PARTS) else ()
