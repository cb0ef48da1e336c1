"""A policy is one call: frame and instruction in, seven numbers out, in the data set's units; or a chunk of them for the next steps.

`Policy` is the Protocol that evaluation and serving rely on, `VLAPolicy` the model behind it. Both take the name of the episode that a frame
belongs to: the answer to its last frame is then the draft of the next, which saves forward passes and changes nothing.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prismatic.errors import ConfigError, PolicyError, is_out_of_memory
from prismatic.models.decode import ActionDecoder
from prismatic.models.vla import VLA
from prismatic.policy_inputs import DAMAGED, as_frames, as_states, check_batch
from prismatic.processor import Processor

Frames = Sequence[np.ndarray]  # one a row of a batch
Texts = Sequence[str]
Rows = Frames | None  # None: not given
One = np.ndarray | None
Names = Sequence[Hashable] | None
REMEMBERED = 1024  # episodes whose last answer is kept


class Policy(Protocol):
    """Frames and states in, actions out, in the data set's units, gripper 1 open … 0 close. A subclass writes batch_chunks and metadata.

    frame, wrist: (H, W, 3) uint8, upright. state: (8,) float32, end effector's position (m) and axis-angle (rad), gripper's two joints (m).
    num_images 2 wants the wrist frame too, uses_state the state. K = num_actions_chunk actions a query, 1 for OpenVLA.
    episode: the same name while one robot goes on. last_margins (B,): the least logit margin of each row's tokens in the last answer, inf
    where there are none.
    """

    num_images: int
    num_actions_chunk: int
    uses_state: bool
    last_margins: np.ndarray

    def __call__(
        self, frame: np.ndarray, instruction: str, wrist: One = None, state: One = None, *, episode: Hashable = None
    ) -> np.ndarray:
        """(7,) float32: the first action of the chunk."""
        return self.chunk(frame, instruction, wrist, state, episode=episode)[0]

    def chunk(
        self, frame: np.ndarray, instruction: str, wrist: One = None, state: One = None, *, episode: Hashable = None
    ) -> np.ndarray:
        """(K, 7) float32: the actions of the next K steps."""
        wrists, states = (None if one is None else [one] for one in (wrist, state))
        return self.batch_chunks([frame], [instruction], wrists, states, episodes=[episode])[0]

    def batch(
        self, frames: Frames, instructions: Texts, wrists: Rows = None, states: Rows = None, *, episodes: Names = None
    ) -> np.ndarray:
        """(B, 7) float32, equal to B single calls."""
        return self.batch_chunks(frames, instructions, wrists, states, episodes=episodes)[:, 0]

    def batch_chunks(
        self, frames: Frames, instructions: Texts, wrists: Rows = None, states: Rows = None, *, episodes: Names = None
    ) -> np.ndarray:
        """(B, K, 7) float32, equal to B single chunks. episodes: a name a row, None for none."""
        ...

    def metadata(self) -> dict[str, Any]:
        """What a result must say about the policy that made it."""
        ...


class VLAPolicy(Policy):
    """A model and the processor it learnt with, as a Policy.

    facts: what `metadata` says besides how it decodes (policy_metadata.py). decoder: None decodes eagerly. drafting: whether answers are drafted
    from the last one (see decode.py). `counts`: what decoding has done so far (actions, calls, forward passes, accepted tokens of drafts).
    """

    def __init__(
        self,
        vla: VLA,
        processor: Processor,
        facts: Mapping[str, Any],
        *,
        decoder: ActionDecoder | None = None,
        drafting: bool = False,
    ) -> None:
        self.vla, self.processor, self.facts = vla.eval(), processor, facts
        self.decoder, self.drafting = decoder or ActionDecoder(vla), drafting
        self.counts: Counter[str] = Counter()
        self._last: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.num_images = processor.config.num_images_in_input
        self.num_actions_chunk = processor.config.num_actions_chunk
        self.uses_state = processor.config.proprio_dim > 0
        self.last_margins = np.zeros(0)
        first = next(vla.parameters())
        self.device, self.dtype = first.device, first.dtype

    def metadata(self) -> dict[str, Any]:
        return {**self.facts, "decoder": self.decoder.description}

    def batch_chunks(
        self, frames: Frames, instructions: Texts, wrists: Rows = None, states: Rows = None, *, episodes: Names = None
    ) -> np.ndarray:
        check_batch(instructions, frames=frames, wrists=wrists, states=states, episodes=episodes)
        frames = as_frames(frames, "frames")
        wrists = as_frames(wrists, "wrists") if self.num_images == 2 and wrists is not None else None
        states = as_states(states, "states") if self.uses_state else None
        try:
            answers = self.raw_chunks(frames, instructions, wrists, states, episodes=episodes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            answers = None
        if answers is None:  # raised out here: the error above would hold what the failed pass had
            self.decoder.release()
            if len(frames) > 1:
                raise PolicyError(f"the GPU has no memory to answer {len(frames)} at once")
            raise ConfigError("the GPU has no memory left: end what else runs there, or quantise")
        tokens = self.processor.config.action_head != "l1"
        actions = self.processor.actions(answers) if tokens else self.processor.unnormalize(answers)
        if not np.isfinite(actions).all() or np.isnan(self.last_margins).any():
            raise PolicyError(DAMAGED)
        return actions.astype(np.float32)  # (B, K, 7)

    @torch.inference_mode()
    def raw_chunks(
        self, frames: Frames, instructions: Texts, wrists: Rows = None, states: Rows = None, *, episodes: Names = None
    ) -> np.ndarray:
        """(B, K, 7) as the head answers: token ids, or of a regression normalised numbers. A head of chunks has nothing to draft."""
        input_ids, mask, pixels = self._inputs(frames, instructions, wrists)
        names = [None] * len(input_ids) if episodes is None else list(episodes)
        if self.processor.config.action_head == "tokens":
            draft = self._draft(names)
            answer = self.decoder(input_ids, pixels, self.processor.action_dim, mask, draft)
        else:
            draft, proprio = None, self.processor.proprio(states)
            answer = self.decoder.chunk(input_ids, pixels, None if proprio is None else proprio.to(self.device), mask)
        ids = answer.ids.cpu()
        self.last_margins = answer.margins.amin(dim=1).cpu().numpy()
        self.counts.update(actions=len(ids) * self.num_actions_chunk, calls=1, passes=answer.forward_passes)
        if draft is not None:
            self.counts["accepted"] += int((draft == ids).cumprod(dim=1).sum())
        if self.drafting:
            self._remember(names, ids)
        return ids.reshape(len(ids), self.num_actions_chunk, -1).numpy()

    def _inputs(self, frames: Frames, instructions: Texts, wrists: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded prompt ids and their mask (B, T), and pixel_values, on the model's device."""
        if self.num_images == 2 and wrists is None:
            raise ConfigError("this policy learnt with two images: pass the wrist camera's frame as wrist=")
        views = zip(frames, wrists, strict=True) if self.num_images == 2 and wrists is not None else zip(frames)
        rows = [self.processor.inputs(images, text) for images, text in zip(views, instructions, strict=True)]
        prompts = [torch.tensor(ids) for ids, _ in rows]
        pad = self.processor.config.pad_token_id
        input_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(ids) for ids in prompts])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        pixels = torch.stack([pixel_values for _, pixel_values in rows])
        return input_ids.to(self.device), mask.to(self.device), pixels.to(self.device, self.dtype)

    def _draft(self, names: Sequence[Hashable]) -> Tensor | None:
        """(B, action_dim): what each named episode was answered last; to the others the middle token, which is no motion. None if to all."""
        if not self.drafting or not any(name in self._last for name in names):
            return None
        config = self.processor.config
        middle = torch.full((self.processor.action_dim,), config.vocab_size - config.n_action_bins // 2)
        return torch.stack([middle if name is None else self._last.get(name, middle) for name in names])

    def _remember(self, names: Sequence[Hashable], ids: Tensor) -> None:
        for name, row in zip(names, ids, strict=True):
            if name is not None:
                self._last[name] = row
                self._last.move_to_end(name)
        while len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
