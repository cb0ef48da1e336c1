"""Is the inference path right? Frames of a data set go through the whole policy; its answers are compared with what was recorded.

Beside it stands the training path on the same frames: the Processor's examples and one teacher-forced pass. Without
augmentation the two differ in two things only: a live frame goes through JPEG once more, and from the second number on
training reads the recorded numbers before it where the policy reads its own. So the first number's accuracy must be the same
to within a frame or two, and neither may be far from what fine-tuning logged.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from prismatic.data.examples import example
from prismatic.data.frames import FrameCache, Step
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg
from prismatic.models.vla import IGNORE
from prismatic.policy import Policy, VLAPolicy

BATCH = 8  # frames of one pass


def open_loop(policy: Policy, cache: FrameCache, *, frames: int) -> dict[str, Any]:
    """Metrics over at most `frames` frames of the training episodes, and as many of the others, evenly spread.

    splits: train, validation → frames; policy and teacher_forced: action_accuracy (share of the tokens), l1_loss (mean
    difference of bin centres, normalised units), both also per_dimension; same_first_id: share of frames in which both paths
    answer alike with the first number. Recorded actions are normalised by the statistics that the policy acts with.
    """
    if not isinstance(policy, VLAPolicy):
        raise ConfigError("--open_loop asks a model that learnt from such data, and this policy is none")
    head = policy.processor.config.action_head
    if head != "tokens":
        raise ConfigError(
            f"--open_loop reads tokens one by one, and this policy's head is {head}: finetune.py validates it"
        )
    if policy.num_images > 1 and not cache.has_wrist:
        raise ConfigError(f"{cache.name} has no wrist_image, which this policy looks at: give another --dataset_name")
    splits = {"train": cache.train_indices(), "validation": cache.validation_indices()}
    found = {}
    for name, indices in splits.items():
        chosen = indices[np.unique(np.linspace(0, len(indices) - 1, min(frames, len(indices))).astype(int))]
        if len(chosen):
            found[name] = _split(policy, [cache[int(frame)] for frame in chosen])
    return {"dataset": cache.name, "dataset_fingerprint": cache.fingerprint, "splits": found}


def _split(policy: VLAPolicy, steps: Sequence[Step]) -> dict[str, Any]:
    true, acted, forced = [], [], []
    for part in (steps[start : start + BATCH] for start in range(0, len(steps), BATCH)):
        pictures = list(zip(*(_pictures(step, policy.num_images) for step in part), strict=True))
        wrists = list(pictures[1]) if policy.num_images > 1 else None
        # the ids, not the actions made of them: a number that is constant in the data hides which id it came from
        acted.append(policy.action_ids(list(pictures[0]), [step.instruction for step in part], wrists))
        true.append(policy.processor.action_ids(np.stack([step.actions[0] for step in part])))
        forced.append(teacher_forced_ids(policy, part))
    target, answers, told = map(np.concatenate, (true, acted, forced))
    return {
        "frames": len(steps),
        "policy": _metrics(policy, answers, target),
        "teacher_forced": _metrics(policy, told, target),
        "same_first_id": float(np.mean(answers[:, 0] == told[:, 0])),
    }


def _pictures(step: Step, num_images: int) -> Iterator[np.ndarray]:
    yield decode_jpeg(step.image)
    if num_images > 1:
        assert step.wrist is not None
        yield decode_jpeg(step.wrist)


@torch.inference_mode()
def teacher_forced_ids(policy: VLAPolicy, steps: Sequence[Step]) -> np.ndarray:
    """(B, 7) ids as in training: the recorded frames as they are, the recorded numbers before each one given."""
    processor = policy.processor
    steps = [step._replace(dataset=processor.config.unnorm_key) for step in steps]  # the statistics that it acts with
    batch = processor.collate([example(step, processor, as_acting=True) for step in steps]).to(policy.device)
    pixels = batch.pixel_values.to(policy.dtype)
    logits = policy.vla(batch.input_ids, batch.attention_mask, pixels, batch.labels).logits  # (labels that count, rows)
    targets = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE]
    tokenizer = processor.action_tokenizer
    actions = targets >= tokenizer.first_id
    # the policy chooses among the action ids only
    ids = tokenizer.first_id + logits[actions][:, tokenizer.first_id : processor.config.vocab_size].argmax(dim=-1)
    return ids.reshape(len(steps), -1).cpu().numpy()


def _metrics(policy: VLAPolicy, ids: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    decode = policy.processor.action_tokenizer.decode
    right, distance = ids == target, np.abs(decode(ids) - decode(target))
    return {
        "action_accuracy": float(right.mean()),
        "l1_loss": float(distance.mean()),
        "per_dimension": {"action_accuracy": right.mean(axis=0).tolist(), "l1_loss": distance.mean(axis=0).tolist()},
    }
