"""Is the inference path right? Frames of a data set go through the whole policy; its answers are compared with what was recorded.

Beside it stands the training path on the same frames: the Processor's examples and one teacher-forced pass. Without augmentation the two differ
in two things only: a live frame goes through JPEG once more, and a head that decodes token by token reads, from the second number on, its own
numbers where training reads the recorded ones. So the first number's accuracy must be the same to within a frame or two, of a head that answers
with chunks all numbers must be nearly the same, and neither path may be far from what fine-tuning logged.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from action_tokenizer import ActionTokenizer
from prismatic.data.examples import example
from prismatic.data.frames import VAL_SHARE, FrameCache, Step
from prismatic.dataset_statistics import check_entry
from prismatic.errors import ConfigError
from prismatic.image import decode_jpeg
from prismatic.models.vla import IGNORE, VLA
from prismatic.policy import Policy, VLAPolicy
from prismatic.policy_inputs import DAMAGED
from prismatic.processor import Batch, Processor

BATCH = 8  # frames of one pass
SAME = 0.01  # between two numbers that are called alike: a second JPEG moves a regression a little, a token not at all or by 1


def open_loop(policy: Policy, cache: FrameCache, *, frames: int, val_share: float = VAL_SHARE) -> dict[str, Any]:
    """Metrics over at most `frames` frames of the training episodes, and as many of the others (val_share of all), evenly spread.

    splits: train, validation → frames; policy and teacher_forced: action_accuracy (share of the tokens, of a head that has some), l1_loss (mean
    difference in normalised units, of tokens that of bin centres), both also per_dimension; same_first_id: share of frames in which both
    paths answer alike with the first number. Recorded actions are normalised by the statistics that the policy acts with.
    """
    if not isinstance(policy, VLAPolicy):
        raise ConfigError("--open_loop asks a model that learnt from such data, and this policy is none")
    if policy.num_images > 1 and not cache.has_wrist:
        raise ConfigError(
            f"{cache.name} has no wrist_image, which this policy looks at: "
            "name its camera by --data_keys wrist=…, or give another --dataset_name"
        )
    key, width = str(policy.processor.config.unnorm_key), cache.actions.shape[1]
    entry = policy.processor.statistics[key]
    check_entry(entry, f"the policy's statistics of {key}", state=policy.uses_state, whole=True)
    if (size := len(entry["action"]["q01"])) != width:
        raise ConfigError(
            f"{cache.name} has actions of {width} numbers, this policy's have {size}: give another --dataset_name"
        )
    count = policy.num_actions_chunk
    splits = {
        "train": cache.train_indices(val_share, num_actions_chunk=count),
        "validation": cache.validation_indices(val_share, num_actions_chunk=count),
    }
    found = {}
    for name, indices in splits.items():
        chosen = indices[np.unique(np.linspace(0, len(indices) - 1, min(frames, len(indices))).astype(int))]
        if len(chosen):
            found[name] = _split(policy, [cache.step(int(frame), count) for frame in chosen])
    return {"dataset": cache.name, "dataset_fingerprint": cache.fingerprint, "splits": found}


def _split(policy: VLAPolicy, steps: Sequence[Step]) -> dict[str, Any]:
    processor = policy.processor
    true, acted, forced = [], [], []
    for part in (steps[start : start + BATCH] for start in range(0, len(steps), BATCH)):
        batch = as_acting(part, processor)
        assert batch.actions is not None
        true.append(batch.actions.numpy())
        forced.append(teacher_forced(policy.vla, batch, processor.action_tokenizer))
        wrists = [decode_jpeg(step.wrist or b"") for step in part] if policy.num_images > 1 else None
        states = [np.asarray(step.state) for step in part] if policy.uses_state else None
        said = [processor.shortened(step.instruction, batch.actions[0].numel()) for step in part]  # as in training
        views = [decode_jpeg(step.image) for step in part], said, wrists
        # not the actions made of it: a number that is constant in the data hides what was answered
        acted.append(policy.raw_chunks(*views, states))
        if np.isnan(policy.last_margins).any() or not np.isfinite([acted[-1], forced[-1]]).all():
            raise ConfigError(DAMAGED)
    target, answers, told = map(np.concatenate, (true, acted, forced))
    return {
        "frames": len(steps),
        "policy": _metrics(policy, answers, target),
        "teacher_forced": _metrics(policy, told, target),
        "same_first_id": float(np.mean(np.isclose(answers[:, 0, 0], told[:, 0, 0], rtol=0, atol=SAME))),
    }


def as_acting(steps: Sequence[Step], processor: Processor) -> Batch:
    """Samples with images as when acting, of the statistics that the policy acts with."""
    steps = [step._replace(dataset=processor.config.unnorm_key) for step in steps]
    return processor.collate([example(step, processor, as_acting=True) for step in steps])


@torch.inference_mode()
def teacher_forced(vla: VLA, batch: Batch, tokenizer: ActionTokenizer) -> np.ndarray:
    """(B, K, D) ids or numbers, as policy.raw_chunks: the recorded frames as they are, the recorded numbers before each one given."""
    batch = batch.to(next(vla.parameters()).device)
    out = vla(**vars(batch))
    if out.logits is None:
        assert out.actions is not None
        return out.actions.float().cpu().numpy()
    targets = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE]
    logits = out.logits[targets >= tokenizer.first_id]  # of the labels that count; it chooses among the action ids
    ids = tokenizer.first_id + logits[:, tokenizer.first_id : vla.config.vocab_size].argmax(dim=-1)
    return ids.cpu().numpy().reshape(len(batch.labels), vla.config.num_actions_chunk, -1)


def _metrics(policy: VLAPolicy, answers: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    found, tokenizer = {}, policy.processor.action_tokenizer
    if policy.processor.config.action_head != "l1":
        ids = tokenizer.encode(target)
        found["action_accuracy"] = answers == ids
        answers, target = tokenizer.decode(answers), tokenizer.decode(ids)
    found["l1_loss"] = np.abs(answers - target)
    per_dimension = {name: values.mean(axis=(0, 1)).tolist() for name, values in found.items()}
    return {name: float(values.mean()) for name, values in found.items()} | {"per_dimension": per_dimension}
