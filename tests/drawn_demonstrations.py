"""LIBERO's own demonstration files, written from given states and actions."""

from pathlib import Path

import h5py
import numpy as np


def write_libero_file(path: Path, demos: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """(states, actions) of each demonstration as LIBERO's create_dataset.py lays them out, without the pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Libero_Tabletop_Manipulation"
        data.attrs["num_demos"] = len(demos)
        for number, (states, actions) in enumerate(demos):
            group = data.create_group(f"demo_{number}")
            group.attrs["num_samples"] = len(actions)
            group.attrs["init_state"] = states[0]
            last = np.eye(1, len(actions), len(actions) - 1, dtype=np.uint8)[0]
            arrays = {"states": states, "actions": actions, "rewards": last, "dones": last}
            for name, array in arrays.items():
                group.create_dataset(name, data=array)
            group.create_group("obs").create_dataset("joint_states", data=np.zeros((len(actions), 7)))
