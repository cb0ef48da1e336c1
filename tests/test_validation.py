"""Validation: frames that training never sees, looked at as when acting, right numbers, and not a bit of the training changed by it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune
from config import FinetuneConfig
from prismatic import image
from prismatic.data.examples import example
from prismatic.data.frames import FrameCache, Mixture
from prismatic.models.tiny import TINY, random_vla, tiny_tokenizer
from prismatic.models.vla import IGNORE
from prismatic.normalize import ACTION_DIMENSIONS
from prismatic.processor import Processor, ProcessorConfig
from prismatic.training import validation
from prismatic.training.validation import Validation

pytest_plugins = ["tests.drawn_run"]

NUMBERS = ("val_loss", "val_action_accuracy", "val_l1_loss")
PER_DIMENSION = ("val_action_accuracy_per_dimension", "val_l1_loss_per_dimension")


@pytest.fixture
def mixture(place: Path) -> Mixture:
    return Mixture([FrameCache(place / "cache")], seed=0, val_share=0.75)


@pytest.fixture
def processor(mixture: Mixture) -> Processor:
    config = ProcessorConfig.for_model(TINY, unnorm_key="drawn", center_crop=True)
    return Processor(config, tiny_tokenizer(["put block 1 on the plate"]), mixture.statistics)


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
    step = mixture.caches[dataset][frame]
    assert step.wrist is not None
    monkeypatch.setattr(image, "jpeg_round_trip", lambda live: live)  # the recorded frame has been through JPEG
    _, live = processor.inputs([image.decode_jpeg(step.image), image.decode_jpeg(step.wrist)], step.instruction)
    assert torch.equal(example(step, processor, as_acting=True).pixel_values, live)
    assert not torch.equal(example(step, processor).pixel_values, live)  # it is cropped


def test_the_numbers_are_those_of_one_sample_after_another(mixture: Mixture, processor: Processor) -> None:
    vla = random_vla(TINY, seed=0)
    check = Validation(mixture, processor, batch_size=4)
    assert len(check.frames) % 4, "the last batch should be smaller than the others"
    seen: list[torch.Tensor] = []
    hook = vla.register_forward_pre_hook(
        lambda module, inputs, named: seen.extend(named["pixel_values"]), with_kwargs=True
    )
    measured = check(vla, autocast=False, stopped=never)
    hook.remove()
    losses, predicted, true = [], [], []
    for pixels, (dataset, frame) in zip(seen, check.frames, strict=True):
        batch = processor.collate([example(mixture.caches[dataset][frame], processor, as_acting=True)])
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
    vla = random_vla(TINY, seed=0)
    assert check(vla, autocast=False, stopped=lambda: True) == {}
    assert vla.training


def test_when_it_is_due_and_what_is_said_where_nothing_is_held_out(
    mixture: Mixture, processor: Processor, capsys: pytest.CaptureFixture
) -> None:
    for every, expected in ((3, [3, 6, 8]), (0, [])):
        check = Validation(mixture, processor, batch_size=2, every=every, last=8)
        assert [done for done in range(1, 9) if check.due(done)] == expected
    whole = Mixture(mixture.caches, seed=0, val_share=0.0)
    assert (
        not Validation(whole, processor, batch_size=2, every=0).due(3) and "--val_share" not in capsys.readouterr().out
    )
    assert not Validation(whole, processor, batch_size=2, every=3).due(3) and "--val_share" in capsys.readouterr().out


def test_validation_changes_nothing_that_is_learnt_and_survives_a_stop(cfg: FinetuneConfig) -> None:
    cfg = dataclasses.replace(cfg, val_share=0.5, learning_rate=1e-2, lora_dropout=0.1, max_steps=3)
    plain = finetune.main(dataclasses.replace(cfg, run_id_note="plain", val_steps=0)).parent
    whole = finetune.main(dataclasses.replace(cfg, run_id_note="whole", val_steps=1)).parent
    finetune.main(dataclasses.replace(cfg, run_id_note="halves", val_steps=1, max_steps=2))
    halves = finetune.main(dataclasses.replace(cfg, run_id_note="halves", val_steps=1)).parent
    rows = {run: [json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (plain, whole, halves)}
    adapters = {run: load_file(run / "latest" / "adapter_model.safetensors") for run in rows}
    for name, tensor in adapters[plain].items():
        assert torch.equal(tensor, adapters[whole][name]) and torch.equal(tensor, adapters[halves][name]), name
    assert [row["loss"] for row in rows[plain]] == [row["loss"] for row in rows[whole]]
    for name in ("step", "loss", *NUMBERS, *PER_DIMENSION):
        assert [row[name] for row in rows[whole]] == [row[name] for row in rows[halves]], name
    assert not any(name.startswith("val_") for row in rows[plain] for name in row)
    best = min(rows[whole], key=lambda row: row["val_l1_loss"])
    assert (whole / "best").resolve() == (whole / f"step-{best['step']:06d}").resolve()
    assert (whole / "best").resolve().name == (halves / "best").resolve().name


def test_the_best_is_saved_where_no_save_was_due_and_kept(cfg: FinetuneConfig) -> None:
    cfg = dataclasses.replace(cfg, val_share=0.5, val_steps=1, save_steps=100, keep=1, max_steps=6, learning_rate=0.05)
    run = finetune.main(cfg).parent
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    best = min(rows, key=lambda row: row["val_l1_loss"])["step"]
    assert best < 6, "choose another learning rate: the last step should not be the best"
    assert sorted(folder.name for folder in run.glob("step-*")) == [f"step-{best:06d}", "step-000006"]
    assert (run / "best" / "adapter_model.safetensors").is_file()
