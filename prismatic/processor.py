"""The waist: all that must be equal when the model learns and when it acts, in one object that is saved beside every adapter.

In when learning: recorded frames, instruction, actions, state. In when acting: live frames, instruction, state, and what the model answered.
Surprising: the instruction is lower-cased but not stripped; the token behind the prompt ("▁", 29871) is given, not learnt; live frames go
through JPEG and Lanczos, because recorded ones did.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from action_tokenizer import ActionTokenizer
from prismatic import image, normalize
from prismatic.models.vla import IGNORE, VLAConfig
from prismatic.policy_inputs import InputError
from prismatic.ranges import ActionHead, Count, Few, Images, Positive, Share

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
IMAGE_MARK = "<image>"  # the original takes it out of recorded instructions, not of live ones
MAX_LENGTH = 2048  # token ids; of a longer row the instruction is cut (the original's collator cuts the action)
# ImageNet's, rounded to bfloat16 by OpenVLA's export
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FORMAT = 1  # of processor.json
Colours = tuple[Share, Share, Share]  # red, green, blue, of pixels in [0, 1]
Augment = Callable[[np.ndarray], np.ndarray]  # (S, S, 3) uint8 → the same, changed
_OPENVLA_7B = VLAConfig()  # the numbers below are the model's: they stand there, once


@dataclass(frozen=True)
class ProcessorConfig:
    """What processor.json holds. A folder that has one allows no override."""

    # which entry of dataset_statistics.json; None: it learnt from several, and acting has to name one
    unnorm_key: str | None
    center_crop: bool  # True if it learnt with random crops
    image_size: Positive = _OPENVLA_7B.image_size  # pixels a side
    num_images_in_input: Images = _OPENVLA_7B.num_images_in_input  # 2: agentview and wrist
    action_head: ActionHead = _OPENVLA_7B.action_head
    num_actions_chunk: Few = _OPENVLA_7B.num_actions_chunk
    proprio_dim: Count = _OPENVLA_7B.proprio_dim  # 0: reads no state
    stop_token: bool = _OPENVLA_7B.stop_token
    means: tuple[Colours, Colours] = (DINO_MEAN, SIGLIP_MEAN)
    stds: tuple[Colours, Colours] = (DINO_STD, SIGLIP_STD)
    vocab_size: Positive = _OPENVLA_7B.vocab_size
    n_action_bins: Positive = _OPENVLA_7B.n_action_bins
    bos_token_id: Count = _OPENVLA_7B.bos_token_id
    eos_token_id: Count = _OPENVLA_7B.eos_token_id
    pad_token_id: Count = _OPENVLA_7B.pad_token_id
    empty_token_id: Count = _OPENVLA_7B.empty_token_id
    base_model: str = ""  # id or folder of the weights it was made with
    base_fingerprint: str = ""
    merged_adapter: str = ""  # fingerprint of the adapter that was folded into these weights
    format: int = FORMAT

    @classmethod
    def for_model(cls, config: VLAConfig, **values: Any) -> "ProcessorConfig":
        """The sizes and special tokens of a model's config, and the given values."""
        shared = {f.name for f in dataclasses.fields(VLAConfig)} & {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: getattr(config, name) for name in shared}, vocab_size=config.vocab_size, **values)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


@dataclass(frozen=True)
class Example:
    """One training sample: ids and labels (T,) int64, pixel_values (6·n_images, S, S), normalised actions (K, D) and state (S,) float32."""

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    actions: Tensor
    proprio: Tensor | None = None


@dataclass
class Batch:
    """Right-padded samples: ids, labels (B, T) int64, attention_mask (B, T) bool, pixel_values (B, 6·n_images, S, S) float32,
    actions (B, K, D) and proprio (B, S) float32, normalised.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    actions: Tensor | None = None
    proprio: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """All tensors on device, without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """What torch's loader asks for with pin_memory=True; without it a batch stays as it is, and its copy to a GPU is waited for."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Batch(*(None if tensor is None else change(tensor) for tensor in tensors))  # pyright: ignore[reportArgumentType]


class Processor:
    """Frames, states and instructions in, tensors out; the model's answer in, actions out. `statistics`: content of dataset_statistics.json."""

    def __init__(
        self, config: ProcessorConfig, tokenizer: PreTrainedTokenizerFast, statistics: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.action_tokenizer = ActionTokenizer(config.vocab_size, config.n_action_bins)
        self.pixel_constants = np.array(config.means), np.array(config.stds)  # (towers, 3) each

    def action_statistics(self, dataset: str | None = None) -> Mapping[str, Any]:
        """The "action" part of a data set's entry; of config.unnorm_key's if none is named."""
        return self.statistics[dataset or str(self.config.unnorm_key)]["action"]

    @property
    def action_dim(self) -> int:
        return len(self.action_statistics()["q01"])

    def prompt_ids(self, instruction: str) -> list[int]:
        """Token ids of the prompt, BOS first, the empty token last."""
        ids = list(self.tokenizer(PROMPT.format(instruction=instruction.lower())).input_ids)
        return ids if ids[-1] == self.config.empty_token_id else [*ids, self.config.empty_token_id]

    def shortened(self, instruction: str, action_ids: int) -> str:
        """A recorded instruction, cut at its end where the row, with so many action ids, would be longer than the model's text may be."""
        text, room = instruction.replace(IMAGE_MARK, ""), MAX_LENGTH - action_ids - 1
        while (ids := len(self.prompt_ids(text))) > room and text:
            text = text[: min(len(text) * room // ids, len(text) - 1)]
        return text

    def example(
        self,
        images: Sequence[np.ndarray],
        instruction: str,
        actions: np.ndarray,
        *,
        state: np.ndarray | None = None,
        dataset: str | None = None,
        augmentations: Sequence[Augment] = (),
        as_acting: bool = False,
    ) -> Example:
        """A training sample from recorded frames (H, W, 3) uint8 as the data set's JPEG decoded, actions (K, D) and state in its units.

        state: only what proprio_dim asks for. augmentations: one an image, or none. as_acting: the images are what `inputs` would make of the
        same frames live, for validation.
        """
        targets = normalize.normalize(np.atleast_2d(actions), self.action_statistics(dataset))  # (K, D)
        prompt = self.prompt_ids(self.shortened(instruction, targets.size))
        end = [self.config.eos_token_id] * (self.config.stop_token or self.config.action_head == "tokens")
        ids = [*prompt, *self.action_tokenizer.encode(targets).ravel().tolist(), *end]
        labels = [IGNORE] * len(prompt) + ids[len(prompt) :]
        images = [image.resize_lanczos3(frame, self.config.image_size) for frame in images]
        if as_acting and self.config.center_crop:
            images = [image.center_crop(frame) for frame in images]
        if augmentations:
            images = [augment(frame) for augment, frame in zip(augmentations, images, strict=True)]
        learnt, proprio = torch.from_numpy(targets), self.proprio(state, dataset=dataset)
        return Example(torch.tensor(ids), torch.tensor(labels), self.pixel_values(images), learnt, proprio)

    @property
    def image_path(self) -> image.ImagePath:
        """What `inputs` does to a frame, for a process beside the camera."""
        return image.ImagePath(self.config.image_size, self.config.center_crop)

    def inputs(self, frames: Sequence[np.ndarray | image.PreparedImage], instruction: str) -> tuple[list[int], Tensor]:
        """Prompt ids and pixel_values (6·n_images, S, S) from live frames (H, W, 3) uint8, upright, or what image_path made of them."""
        prepared = [frame if isinstance(frame, image.PreparedImage) else self.image_path(frame) for frame in frames]
        if len(ids := self.prompt_ids(instruction)) >= MAX_LENGTH:
            raise InputError(f"the prompt has {len(ids):,} tokens, and the model reads {MAX_LENGTH:,}: shorten it")
        return ids, self.pixel_values([one.pixels for one in prepared])

    def proprio(self, states: np.ndarray | Sequence[np.ndarray] | None, *, dataset: str | None = None) -> Tensor | None:
        """States (..., S) in a data set's units → float32 as the model reads them; None for a model that reads none."""
        if not self.config.proprio_dim:
            return None
        shape = None if states is None else np.shape(states)
        if not shape or shape[-1] != self.config.proprio_dim:
            given = "none is given" if shape is None else f"{list(shape)} is given"
            raise InputError(f"this model reads a robot state of {self.config.proprio_dim} numbers, but {given}")
        stats = self.statistics[dataset or str(self.config.unnorm_key)]["proprio"]
        return torch.from_numpy(normalize.normalize_state(np.asarray(states), stats)).float()

    def pixel_values(self, images: Sequence[np.ndarray]) -> Tensor:
        """(H, W, 3) uint8 images → (6·n_images, S, S) float32, normalised for each tower; another size is squashed by PIL's bicubic."""
        sized = [image.resize_bicubic(frame, self.config.image_size) for frame in images]
        return torch.from_numpy(np.concatenate([image.normalize_pixels(p, *self.pixel_constants) for p in sized]))

    def actions(self, ids: np.ndarray) -> np.ndarray:
        """(..., D) action ids → (..., D) float64 actions in the data set's units, gripper 1 open … 0 close."""
        return self.unnormalize(self.action_tokenizer.decode(ids))

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """(..., D) normalised actions → float64 in the data set's units, by the formula of the head's original."""
        smallest = 0.0 if self.config.action_head == "tokens" else normalize.SMALLEST_RANGE
        return normalize.unnormalize(values, self.action_statistics(), smallest_range=smallest)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-pad samples into a batch."""
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad([e.input_ids for e in examples], batch_first=True, padding_value=self.config.pad_token_id)
        labels = pad([e.labels for e in examples], batch_first=True, padding_value=IGNORE)
        pixels = torch.stack([e.pixel_values for e in examples])
        actions = torch.stack([e.actions for e in examples])
        states = [e.proprio for e in examples if e.proprio is not None]
        proprio = torch.stack(states) if states else None
        return Batch(input_ids, labels, input_ids != self.config.pad_token_id, pixels, actions, proprio)
