"""Validation: frames that training never sees, looked at as when acting, right numbers, and not a bit of the training changed by it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune
from config import FinetuneConfig
from prismatic import image
from prismatic.data.examples import example
from prismatic.data.frames import Mixture
from prismatic.models.tiny import random_vla
from prismatic.models.vla import IGNORE, VLA
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.processor import Processor
from prismatic.training import validation
from prismatic.training.validation import Validation
from tests.drawn_checkpoint import drawn_processor
from tests.drawn_run import SMALL, drawn_mixture, rows

pytest_plugins = ["tests.drawn_run"]

NUMBERS = ("val_loss", "val_action_accuracy", "val_l1_loss")
PER_DIMENSION = ("val_action_accuracy_per_dimension", "val_l1_loss_per_dimension")


@pytest.fixture
def mixture(place: Path) -> Mixture:
    return drawn_mixture(place, seed=0, val_share=0.75)


@pytest.fixture
def processor(mixture: Mixture) -> Processor:
    return drawn_processor(SMALL, "drawn", mixture.statistics)


def never() -> bool:
    return False


def test_no_frame_is_both_learnt_and_validated(mixture: Mixture, processor: Processor) -> None:
    held_out = set(Validation(mixture, processor, batch_size=2).frames)
    learnt = {mixture.locate(draw) for draw in range(2 * len(mixture))}
    assert held_out and learnt and not held_out & learnt
    (cache,) = mixture.caches
    episodes = [{int(cache.episode[frame]) for _, frame in frames} for frames in (held_out, learnt)]
    assert not episodes[0] & episodes[1]


def test_held_out_frames_look_as_when_acting(
    mixture: Mixture, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, frame = mixture.held_out(1)[0]
    step = mixture.caches[dataset].step(frame)
    assert step.wrist is not None
    monkeypatch.setattr(image, "jpeg_round_trip", lambda live: live)  # the recorded frame has been through JPEG
    _, live = processor.inputs([image.decode_jpeg(step.image), image.decode_jpeg(step.wrist)], step.instruction)
    assert torch.equal(example(step, processor, as_acting=True).pixel_values, live)
    assert not torch.equal(example(step, processor).pixel_values, live)  # it is cropped


def test_the_numbers_are_those_of_one_sample_after_another(mixture: Mixture, processor: Processor) -> None:
    vla = random_vla(SMALL, seed=0)
    check = Validation(mixture, processor, batch_size=4)
    assert len(check.frames) % 4, "the last batch should be smaller than the others"
    seen: list[torch.Tensor] = []

    def see(module: torch.nn.Module, inputs: tuple, named: dict[str, torch.Tensor]) -> None:
        assert not torch.is_autocast_cache_enabled()  # it would hold a copy of every weight until the end
        seen.extend(named["pixel_values"])

    hook = vla.register_forward_pre_hook(see, with_kwargs=True)
    measured = check(vla, autocast=False, stopped=never)
    hook.remove()
    losses, predicted, true = [], [], []
    for pixels, (dataset, frame) in zip(seen, check.frames, strict=True):
        batch = processor.collate([example(mixture.caches[dataset].step(frame), processor, as_acting=True)])
        assert torch.equal(pixels, batch.pixel_values[0])
        out = vla.eval()(batch.input_ids, batch.attention_mask, batch.pixel_values, batch.labels)
        losses.append(out.loss.item())
        predicted.append(out.logits.argmax(-1)[:7].numpy())
        true.append(batch.labels[batch.labels != IGNORE][:7].numpy())
    right = np.equal(predicted, true)
    values, targets = (processor.action_tokenizer.decode(np.array(ids)) for ids in (predicted, true))
    distance = np.abs(values - targets)
    assert measured["val_frames"] == len(check.frames)
    expected = [np.mean(losses), right.mean(), distance.mean(), right.mean(axis=0), distance.mean(axis=0)]
    for name, value in zip((*NUMBERS, *PER_DIMENSION), expected, strict=True):
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, err_msg=name)
    assert len(measured["val_l1_loss_per_dimension"]) == len(ACTION_DIMENSIONS)


def test_it_is_bounded_and_stops_when_asked(
    mixture: Mixture, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "FRAMES", 3)
    check = Validation(mixture, processor, batch_size=2)
    every = mixture.held_out(10**6)
    assert len(check.frames) == 3 < len(every)
    assert check.frames[0] == every[0] and check.frames[-1] == every[-1]  # spread over all episodes
    vla = random_vla(SMALL, seed=0)
    assert check(vla, autocast=False, stopped=lambda: True) == {}
    assert vla.training


def test_when_it_is_due_and_what_is_said_where_nothing_is_held_out(
    mixture: Mixture, processor: Processor, capsys: pytest.CaptureFixture
) -> None:
    for every, expected in ((3, [3, 6, 8]), (0, [])):
        check = Validation(mixture, processor, batch_size=2, every=every, last=8)
        assert [done for done in range(1, 9) if check.due(done)] == expected
    whole = Mixture(mixture.caches, seed=0, val_share=0.0)
    for every in (0, 3):
        assert not Validation(whole, processor, batch_size=2, every=every).due(3)
        assert ("--val_share" in capsys.readouterr().out) == (every > 0)


def test_validation_changes_nothing_that_is_learnt_survives_a_stop_and_keeps_the_best(
    cfg: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Validation.__call__

    def without_gradients(self: Validation, vla: VLA, **how: Any) -> dict[str, Any]:
        assert not [name for name, parameter in vla.named_parameters() if parameter.grad is not None]
        return validate(self, vla, **how)

    monkeypatch.setattr(Validation, "__call__", without_gradients)
    cfg = dataclasses.replace(cfg, val_share=0.5, learning_rate=0.05, lora_dropout=0.1, keep=1, save_steps=100)
    plain = finetune.main(dataclasses.replace(cfg, run_id_note="plain", val_steps=0)).parent
    cfg = dataclasses.replace(cfg, val_steps=1)
    whole = finetune.main(dataclasses.replace(cfg, run_id_note="whole")).parent
    finetune.main(dataclasses.replace(cfg, run_id_note="halves", max_steps=2))
    halves = finetune.main(dataclasses.replace(cfg, run_id_note="halves")).parent
    adapters = {run: load_file(run / "latest" / "adapter_model.safetensors") for run in (plain, whole, halves)}
    for name, tensor in adapters[plain].items():
        assert torch.equal(tensor, adapters[whole][name]) and torch.equal(tensor, adapters[halves][name]), name
    history = rows(whole)
    assert rows(halves) == history
    learnt = [{name: v for name, v in row.items() if not name.startswith("val_")} for row in history]
    assert learnt == rows(plain)
    best = min(history, key=lambda row: row["val_l1_loss"])["step"]
    assert best < 4, "choose another learning rate: the last step should not be the best"
    for run in (whole, halves):  # saved where no save was due, and kept
        assert sorted(folder.name for folder in run.glob("step-*")) == [f"step-{best:06d}", "step-000004"]
        assert (run / "best" / "adapter_model.safetensors").is_file()
