"""Does quantising change what a policy does? In: a checkpoint and frames of demonstrations. Out: a row for each precision.

Teacher-forced: of a head that answers token by token every token is predicted behind the *demonstrated* ones, so that one early difference does
not colour the six that follow; a chunk comes out of one forward pass anyway. Images are cropped as when acting. Matches are with the
unquantised model on the same frames (float32 on a CPU, bfloat16 on a GPU): alike is what lies in one bin of the action tokenizer, of a
regression's numbers too. Of the L1 distances in normalised units ([-1, 1]) one is to the unquantised model's action and one to the demonstrated one.
This says how alike the answers are; whether the robot still succeeds is for `eval.py --compare` to say.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from action_tokenizer import ActionTokenizer
from prismatic.bench.instruments import Row, release_memory
from prismatic.checkpoint import base_and_adapter, load_merged, load_policy
from prismatic.data.frames import VAL_SHARE, FrameCache
from prismatic.data.mixture import open_cache
from prismatic.episodes.open_loop import as_acting, teacher_forced
from prismatic.errors import ConfigError
from prismatic.filenames import CONFIG
from prismatic.models import quantize
from prismatic.models.quantize import stored_bytes
from prismatic.models.vla import VLA
from prismatic.models.weights import stored_dtype, stored_tensors
from prismatic.processor import Batch

WAYS: dict[str, Row] = {  # arguments of quantize.quantize
    "int8": {"precision": "int8"},
    "int8, image towers too": {"precision": "int8", "vision": True},
    "int8, activations too (W8A8)": {"precision": "int8", "int8_activations": True},
    "int4": {"precision": "int4"},
    "LLM.int8": {"precision": "int8", "backend": "bitsandbytes"},
    "NF4": {"precision": "int4", "backend": "bitsandbytes"},
}


def spread(
    cache: FrameCache, num_frames: int, *, every_episode: bool, chunk: int = 1, val_share: float = VAL_SHARE
) -> np.ndarray:
    """num_frames frame numbers, evenly spread over the validation episodes, or over all of them. ConfigError if there are fewer.

    chunk: actions that must follow a frame in its episode.
    """
    frames = cache.validation_indices(val_share, chunk)
    if every_episode:
        frames = np.concatenate([cache.train_indices(val_share, chunk), frames])
    if len(frames) < num_frames:
        raise ConfigError(
            f"data set {cache.name} has {len(frames)} held-out frames, fewer than --num_frames {num_frames}: ask for fewer, or collect "
            "demonstrations that the checkpoint has never seen (another --seed) and give --held_out all"
        )
    return frames[np.linspace(0, len(frames) - 1, num_frames).round().astype(int)]


def answers(vla: VLA, samples: Sequence[Batch], tokenizer: ActionTokenizer) -> np.ndarray:
    """(N, K, D) normalised actions over all samples, teacher-forced."""
    found = np.concatenate([teacher_forced(vla, batch, tokenizer) for batch in samples])
    return found if vla.config.action_head == "l1" else tokenizer.decode(found)


def row(
    what: str, vla: VLA, actions: np.ndarray, plain: np.ndarray, demonstrated: np.ndarray, tokenizer: ActionTokenizer
) -> Row:
    """One line of the table. Sizes: what the weights take on this device, against the model's (without an adapter) in float32."""
    with torch.device("meta"):
        float32 = torch.float32.itemsize * sum(parameter.numel() for parameter in VLA(vla.config).parameters())
    same, distance = tokenizer.encode(actions) == tokenizer.encode(plain), np.abs(actions - plain)
    return {
        "what": what,
        "MB": round(stored_bytes(vla) / 1e6, 2),
        "% of float32": round(100 * stored_bytes(vla) / float32, 1),
        "frames": len(actions),
        "tokens alike %": round(100 * float(same.mean()), 2),
        "actions alike %": round(100 * float(same.all(axis=-1).mean()), 2),
        "alike % by dimension": [round(100 * share, 1) for share in same.mean(axis=(0, 1)).tolist()],
        "L1 to unquantised": round(float(distance.mean()), 5),
        "its dimensions": [round(value, 4) for value in distance.mean(axis=(0, 1)).tolist()],
        "L1 to demonstrated": round(float(np.abs(actions - demonstrated).mean()), 5),
    }


def run(
    checkpoint: str,
    *,
    adapter: Path | None,
    unnorm_key: str | None,
    data_root_dir: Path,
    dataset_name: str,
    held_out: str,
    num_frames: int,
    batch_size: int,
    val_share: float = VAL_SHARE,
    **data: Any,
) -> list[Row]:
    """The unquantised model's row, then one for each of WAYS. ConfigError for a quantised folder, or too few frames.

    data: mixture.open_cache's other arguments. Host memory holds the images of all frames meanwhile: 1 MB each at 224 pixels.
    """
    folder, adapter = base_and_adapter(checkpoint, adapter)
    quantize.refuse(folder / CONFIG, "the comparison begins with the unquantised model")
    policy = load_policy(folder, adapter, unnorm_key=unnorm_key)
    processor, vla, dtype, device = policy.processor, policy.vla, policy.dtype, str(policy.device)
    cache, tokenizer = open_cache(data_root_dir, dataset_name, **data), processor.action_tokenizer
    chunk = processor.config.num_actions_chunk
    frames = spread(cache, num_frames, every_episode=held_out == "all", chunk=chunk, val_share=val_share)
    parts = (frames[start : start + batch_size] for start in range(0, len(frames), batch_size))
    samples = [as_acting([cache.step(frame, chunk) for frame in part], processor) for part in parts]
    demonstrated = np.concatenate([batch.actions for batch in samples if batch.actions is not None])
    plain = answers(vla, samples, tokenizer)
    rows = [row("none", vla, plain, plain, demonstrated, tokenizer)]
    del policy, vla  # the device holds one model at a time
    own = stored_dtype(stored_tensors(folder))
    for what, way in WAYS.items():
        release_memory()
        vla = load_merged(folder, adapter, dtype=own, device=device)
        quantize.quantize(vla, dtype=dtype, **way)
        rows.append(row(what, vla, answers(vla.eval(), samples, tokenizer), plain, demonstrated, tokenizer))
        del vla
    return rows
