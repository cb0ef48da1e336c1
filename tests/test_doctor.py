"""doctor.py says BAD where a score would be wrong, and only there. Its scenes need the simulator: the last test runs the script."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import doctor
from config import FinetuneConfig
from doctor import DoctorConfig
from prismatic.checkpoint import load_vla, save_checkpoint
from prismatic.errors import ConfigError
from prismatic.models.tiny import random_vla
from prismatic.processor_files import load_processor
from tests.conftest import REPOSITORY
from tests.drawn_cache import write_cache
from tests.drawn_checkpoint import TINY_OFT, saved
from tests.drawn_episodes import drawn_episode

BASE = REPOSITORY / "checkpoints" / "openvla-tiny"


def bad(cfg: DoctorConfig) -> list[str]:
    return [check.text for check in doctor.checks(cfg) if check.good is False]


def test_another_simulator_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bad(DoctorConfig(simulator=False)) == []
    known = doctor.versions()
    monkeypatch.setattr(doctor, "versions", lambda: known | {"mujoco": "3.17.0"})
    assert bad(DoctorConfig(simulator=False)) == ["mujoco 3.17.0, pinned 3.2.3"]


def test_a_missing_data_set_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = bad(DoctorConfig(simulator=False, data_root_dir=str(tmp_path), dataset_name="none"))
    assert "none" in text
    assert len(bad(DoctorConfig(simulator=False, data_root_dir=str(tmp_path), dataset_name="none,nor:0.5"))) == 2
    for weight in ("nan", "much", "-1", "1e9"):
        (text,) = bad(DoctorConfig(simulator=False, data_root_dir=str(tmp_path), dataset_name=f"none:{weight}"))
        assert "is no weight" in text
    monkeypatch.setattr(FinetuneConfig, "data_root_dir", str(tmp_path / "nowhere"))
    (text,) = bad(DoctorConfig(simulator=False, dataset_name="none"))
    assert "nowhere" in text
    with pytest.raises(ConfigError, match="give --checkpoint"):
        doctor.main(DoctorConfig(simulator=False, adapter=tmp_path))


def test_a_model_that_does_not_look_is_bad(tmp_path: Path) -> None:
    assert bad(DoctorConfig(simulator=False, checkpoint=str(BASE))) == []
    vla, processor = load_vla(BASE), load_processor(BASE)
    vla.projector.fc3.weight.data *= 1e-9  # zeros would not even load
    blind = tmp_path / "blind"
    save_checkpoint(
        blind, vla, processor=processor, statistics=dict(processor.statistics), tokenizer_from=BASE, dtype=torch.float32
    )
    (text,) = bad(DoctorConfig(simulator=False, checkpoint=str(blind)))
    assert text.startswith("a black and a white picture change the logits by up to ")


@pytest.fixture(scope="module")
def l1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an L1 head that reads two images and a state of 5 numbers, and learnt from "demo"."""
    return saved(tmp_path_factory.mktemp("l1") / "own", random_vla(TINY_OFT, seed=1))


def told(cfg: DoctorConfig) -> list[tuple[bool | None, str]]:
    return [(check.good, f"{check.text}: {check.remedy}") for check in doctor.policy(cfg, [])]


def test_what_a_checkpoint_is_is_named(l1: Path) -> None:
    loads, head, looks = told(DoctorConfig(checkpoint=str(l1)))
    assert loads == (True, f"{l1} loads, statistics demo: ")
    assert head[1].startswith("its head is l1: chunks of 4 actions of 7 numbers from 2 images and a state of 5 numbers")
    assert looks[1].startswith("a black and a white picture")


@pytest.mark.parametrize(
    ("lost", "flags", "said"),
    [
        ((), {"action_head": "tokens"}, r"--action_head tokens contradicts .*says l1"),
        (("processor.json",), {"action_head": "tokens"}, "its token head is untrained: leave out --action_head tokens"),
        (("action_head.safetensors",), {}, "has no action_head: copy its file"),
        ((), {"unnorm_key": "bridge"}, "--unnorm_key bridge is not there: .* has statistics of demo"),
    ],
)
def test_a_head_that_would_be_played_wrong_is_bad(
    l1: Path, tmp_path: Path, lost: tuple[str, ...], flags: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(l1, tmp_path / "folder"))
    for name in lost:
        (folder / name).unlink()
    ((good, text),) = told(DoctorConfig(checkpoint=str(folder), **flags))
    assert good is False and re.search(said, text), text


def test_a_published_folder_s_assumptions_are_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "published", random_vla(TINY_OFT, seed=1), foreign=True)
    assumed, chosen = (str(told(DoctorConfig(checkpoint=str(folder), num_actions_chunk=n))) for n in (None, 4))
    assert "doesn't say num_actions_chunk: 8 is assumed" in assumed
    assert "chunks of 4 actions" in chosen and "num_actions_chunk: " not in chosen


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"wrist_images": None}, ["demo has no wrist camera, and the checkpoint looks at 2 images: --data_keys wrist="]),
        ({"state": None}, ["demo has no state, and the checkpoint reads one of 5: --data_keys state="]),
        ({"state": 8}, ["demo has a state of 8 numbers, and the checkpoint reads one of 5"]),
        ({"action": 14}, ["demo has actions of 14 numbers, and the checkpoint answers with 7"]),
        ({"name": "mine"}, ["the checkpoint acts with the statistics of demo, the data set is mine: it has statistics of demo alone"]),
    ],
)  # fmt: skip
def test_data_that_lack_what_a_checkpoint_reads_are_bad(
    l1: Path, tmp_path: Path, change: dict[str, Any], said: list[str]
) -> None:
    episode, widths = drawn_episode(1), {"action": 7, "state": 5} | change
    for field in ("action", "state"):
        episode[field] = widths[field] and np.zeros((len(episode["images"]), widths[field]), dtype=np.float32)
    if "wrist_images" in change:
        del episode["wrist_images"]
    cache = write_cache(tmp_path / "cache", [episode], name=change.get("name", "demo"))
    wrong = [f"{c.text}: {c.remedy}" for c in doctor.fits(cache, load_processor(l1)) if c.good is False]
    assert len(wrong) == len(said) and all(map(str.startswith, wrong, said)), wrong


def test_this_machine_renders_what_scores_were_made_with() -> None:
    environment = os.environ | {"MUJOCO_GL": "osmesa"}
    command = [sys.executable, "doctor.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok  golden frame differs by" in done.stdout
