"""doctor.py says BAD where a score would be wrong, and only there. Its scenes need the simulator: the last test runs the script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import doctor
from doctor import DoctorConfig
from prismatic.checkpoint import load_vla, save_checkpoint
from prismatic.processor_files import load_processor
from tests.conftest import REPOSITORY

BASE = REPOSITORY / "checkpoints" / "openvla-tiny"


def bad(cfg: DoctorConfig) -> list[str]:
    return [check.text for check in doctor.checks(cfg) if check.good is False]


def test_counts_of_the_full_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(DoctorConfig(model="openvla-7b")) == 0
    said = capsys.readouterr().out
    for number in ("7,541,237,184", "982", "110,828,288", "7,652,065,472", "439"):
        assert number in said


def test_another_simulator_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bad(DoctorConfig(simulator=False)) == []
    known = doctor.versions()
    monkeypatch.setattr(doctor, "versions", lambda: known | {"mujoco": "3.17.0"})
    assert bad(DoctorConfig(simulator=False)) == ["mujoco 3.17.0, pinned 3.2.3"]


def test_a_missing_data_set_is_bad(tmp_path: Path) -> None:
    (text,) = bad(DoctorConfig(simulator=False, data_root_dir=str(tmp_path), dataset_name="none"))
    assert "none" in text


def test_a_model_that_does_not_look_is_bad(tmp_path: Path) -> None:
    assert bad(DoctorConfig(simulator=False, checkpoint=str(BASE))) == []
    vla, processor = load_vla(BASE), load_processor(BASE)
    torch.nn.init.zeros_(vla.projector.fc3.weight)
    blind = tmp_path / "blind"
    save_checkpoint(
        blind, vla, processor=processor, statistics=dict(processor.statistics), tokenizer_from=BASE, dtype=torch.float32
    )
    (text,) = bad(DoctorConfig(simulator=False, checkpoint=str(blind)))
    assert text.startswith("a black and a white picture change the logits by up to 0")


def test_this_machine_renders_what_scores_were_made_with() -> None:
    done = subprocess.run(
        [sys.executable, "doctor.py"],
        cwd=REPOSITORY,
        env=os.environ | {"MUJOCO_GL": "osmesa"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok  golden frame differs by" in done.stdout and "with the bowl on the ramekin" in done.stdout
