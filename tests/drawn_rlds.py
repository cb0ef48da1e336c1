"""RLDS data sets in the forms that people have, written and read in one process, as TensorFlow starts slowly: python -m tests.drawn_rlds FOLDER

Out: FOLDER/<kind>/ is each one's cache, or FOLDER/<kind>.error the sentence that refused it. TWO_ARMS is what our own writer makes of episodes
without a wrist view and a state.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.image import encode_jpeg

LENGTHS = (3, 1, 4)
INSTRUCTION = "pick up the red block"
TWO_ARMS = "two_arms"


def picture(t: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([(x + 3 * t) % 256, (y + 5 * t) % 256, (x + y) % 256], -1).astype(np.uint8)


def action(t: int, *, gripper: tuple[float, float] = (-1.0, 1.0)) -> np.ndarray:
    """Open (the first of gripper) for two steps, then close."""
    return np.array([0.1 * t, 0.2, -0.1 * t, 0.05 * t, 0.0, 0.3, gripper[t > 1]], dtype=np.float32)


def state(t: int, size: int = 8) -> np.ndarray:
    return np.arange(size, dtype=np.float32) + t


def parts(t: int) -> dict[str, np.ndarray]:
    whole = action(t)
    return {"gripper_closedness_action": whole[6:], "rotation_delta": whole[3:6], "world_vector": whole[:3]}


def kinds(f: Any) -> dict[str, dict[str, Any]]:
    """Kind → what differs from the usual form: features and the values at step t."""
    image, png = f.Image(shape=(48, 64, 3)), f.Image(shape=(48, 64, 3), encoding_format="png")
    raw, text = f.Tensor(shape=(48, 64, 3), dtype=np.uint8), f.Text()

    def vector(n: int, dtype: Any = np.float32) -> Any:
        return f.Tensor(shape=(n,), dtype=dtype)

    three = {"gripper_closedness_action": vector(1), "rotation_delta": vector(3), "world_vector": vector(3)}
    two = f.FeaturesDict({"a": vector(4), "b": vector(3)})
    texts = f.Tensor(shape=(3,), dtype=np.str_)
    return {
        "png": {"image": (png, picture), "wrist_image": (png, lambda t: picture(t + 9))},
        "noformat": {"image": (image, picture)},
        "raw": {"image": (raw, picture)},
        "array_record": {"image": (png, picture)},
        "instruction_in_observation": {"language_instruction": None, "natural_language_instruction": (text, lambda t: INSTRUCTION)},
        "many_words": {"language_instruction": (texts, lambda t: ["", INSTRUCTION, "take it"])},
        "latin1": {"language_instruction": (f.Tensor(shape=(), dtype=np.str_), lambda t: "déplace le bol à gauche".encode("latin-1"))},
        "float64": {"action": (vector(7, np.float64), lambda t: action(t).astype(np.float64))},
        "dict_action": {"action": (f.FeaturesDict(three), parts)},
        "told": {
            "action": (two, lambda t: {"a": action(t)[:4], "b": action(t)[4:]}),
            "image": None, "left": (png, lambda t: picture(t + 9)), "right": (png, picture),
            "keys": {"action": "action/a+action/b", "image": "right", "wrist": "left"},
        },
        "long_state": {"state": (vector(10), lambda t: state(t, 10))},
        "gripper_one_open": {"action": (vector(7), lambda t: action(t, gripper=(1.0, 0.0)))},
        "rotated": {"image": (png, lambda t: picture(t)[::-1, ::-1].copy()), "rotate": True},
        "lean": {"state": None, "splits": {"train": LENGTHS, "val": LENGTHS}},
        "splits": {"splits": {"test": LENGTHS, "train": (0, *LENGTHS), "validation": LENGTHS}},
        "val_and_validation": {"splits": {"train": LENGTHS, "validation": LENGTHS[:1], "val": LENGTHS[1:]}},
        "other_cameras": {"image": None, "left": (png, picture), "right": (png, picture)},
    }  # fmt: skip


def write(tfds: Any, folder: Path, kind: str, changes: dict[str, Any]) -> Path:
    """A data set `folder/kind/1.0.0`."""
    f = tfds.features
    usual = {"image": (f.Image(shape=(48, 64, 3), encoding_format="png"), picture)}
    usual |= {"state": (f.Tensor(shape=(8,), dtype=np.float32), state)}
    usual |= {"action": (f.Tensor(shape=(7,), dtype=np.float32), action)}
    usual |= {"language_instruction": (f.Text(), lambda t: INSTRUCTION)}
    forms = {
        name: form for name, form in (usual | changes).items() if form and name not in ("keys", "rotate", "splits")
    }

    def step(t: int | None = None) -> dict[str, Any]:
        """The values at step t, or the features."""
        fields = {name: form[0] if t is None else form[1](t) for name, form in forms.items()}
        outside = {name: fields.pop(name) for name in ("action", "language_instruction") if name in fields}
        return outside | {"observation": f.FeaturesDict(fields) if t is None else fields}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # pyright: ignore
        name = kind
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict({"steps": f.Dataset(step())}))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {
                name: self._episodes(lengths) for name, lengths in changes.get("splits", {"train": LENGTHS}).items()
            }

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # each split has its own

        def _episodes(self, lengths: tuple[int, ...]) -> Any:
            for number, length in enumerate(lengths):
                yield f"episode_{number}", {"steps": [step(t) for t in range(length)]}

    builder = Builder(data_dir=folder, **({"file_format": "array_record"} if kind == "array_record" else {}))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return folder / kind / "1.0.0"


def main(folder: Path) -> None:
    import tensorflow_datasets as tfds

    from prismatic.data import rlds
    from prismatic.data.dataset_folder import check_whole
    from prismatic.errors import ConfigError

    tfds.disable_progress_bar()
    sets = {
        kind: (write(tfds, folder / "sets", kind, changes), changes.get("keys", {}), changes.get("rotate", False))
        for kind, changes in kinds(tfds.features).items()
    }
    for number, length in enumerate(LENGTHS):
        arms = np.stack([np.tile(action(t), 2) for t in range(length)])
        jpegs = [encode_jpeg(picture(t)) for t in range(length)]
        rlds.stage_episode(folder / f"staged/{number}.npz", images=jpegs, action=arms, instruction=INSTRUCTION)
    (folder / "sets" / TWO_ARMS).mkdir()
    rlds.__name__ = "__main__"  # as in its own child: tfds asks for the file of a builder of another module
    rlds._write(folder / "staged", folder / "sets" / TWO_ARMS, TWO_ARMS)
    sets[TWO_ARMS] = (folder / "sets" / TWO_ARMS, {}, False)
    for kind, (source, told, rotate) in sets.items():
        (folder / kind).mkdir()
        try:
            check_whole(source)
            rlds._read(source, folder / kind, json.dumps([told, rotate]))
        except ConfigError as error:
            (folder / f"{kind}.error").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
