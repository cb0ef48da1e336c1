"""A policy is one call: frame and instruction in, seven numbers out, in the data set's units.

`policy(frame, instruction, wrist=None)`; `policy.batch(frames, instructions, wrists=None)` gives the same rows for many robots at once. Both take
the name of the episode that a frame belongs to: the answer to its last frame then is the draft of the next, which saves passes and changes nothing.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from prismatic import image
from prismatic.errors import ConfigError
from prismatic.models.decode import Decoder
from prismatic.models.vla import VLA
from prismatic.processor import Processor, ProcessorConfig

REMEMBERED = 1024  # episodes whose last answer is kept


class Policy:
    """A model and the processor it learnt with. `num_images` 2 means that it wants the wrist frame too.

    decoder: None decodes pass by pass. drafting: whether answers are drafted from the last one (see decode.py). `counts`: what decoding has
    done so far (actions, passes, confirmed words of drafts, doubtful rows).
    """

    def __init__(
        self,
        vla: VLA,
        processor: Processor,
        card: dict[str, Any],
        *,
        decoder: Decoder | None = None,
        drafting: bool = False,
    ) -> None:
        self.vla = vla.eval()
        self.decoder = decoder or Decoder(vla)
        self.drafting = drafting
        self.counts: Counter[str] = Counter()
        self._last: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self.processor = processor
        self.num_images = processor.config.num_images_in_input
        self._card = card
        self.last_margins = np.zeros(0)  # (B,) of the last answer: the least by which a row's ids beat the second best
        first = next(vla.parameters())
        self.device, self.dtype = first.device, first.dtype

    def __call__(
        self, frame: np.ndarray, instruction: str, wrist: np.ndarray | None = None, *, episode: Hashable = None
    ) -> np.ndarray:
        """(H, W, 3) uint8, upright → (7,) float32, gripper 1 open … 0 close. episode: the same name while the robot goes on."""
        return self.batch([frame], [instruction], None if wrist is None else [wrist], episodes=[episode])[0]

    def batch(
        self,
        frames: Sequence[np.ndarray],
        instructions: Sequence[str],
        wrists: Sequence[np.ndarray] | None = None,
        *,
        episodes: Sequence[Hashable] | None = None,
    ) -> np.ndarray:
        """B frames and instructions of any length → (B, 7) float32, equal to B single calls. episodes: a name a row, None for none."""
        if self.num_images == 2 and wrists is None:
            raise ConfigError(
                "this policy learnt with two pictures (num_images_in_input 2): pass the wrist camera's frame as wrist="
            )
        return self.processor.actions(self.action_ids(frames, instructions, wrists, episodes=episodes)).astype(
            np.float32
        )

    def action_ids(
        self,
        frames: Sequence[np.ndarray],
        instructions: Sequence[str],
        wrists: Sequence[np.ndarray] | None = None,
        *,
        episodes: Sequence[Hashable] | None = None,
    ) -> np.ndarray:
        """As batch, but the (B, 7) token ids."""
        pairs = [[frame] for frame in frames]
        if self.num_images == 2 and wrists is not None:
            pairs = [[frame, wrist] for frame, wrist in zip(frames, wrists, strict=True)]
        rows = [self.processor.inputs(pictures, words) for pictures, words in zip(pairs, instructions, strict=True)]
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        input_ids = torch.full((len(rows), int(lengths.max())), self.processor.config.pad_token_id)
        for row, (ids, _) in zip(input_ids, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        pixels = torch.stack([pixel_values for _, pixel_values in rows])
        names = [None] * len(rows) if episodes is None else list(episodes)
        remembered = any(name in self._last for name in names)
        draft = self._draft(names) if self.drafting and remembered else None
        answer = self.decoder(
            input_ids.to(self.device),
            pixels.to(self.device, self.dtype),
            self.processor.action_dim,
            mask.to(self.device),
            draft,
        )
        ids = answer.ids.cpu()
        self.last_margins = answer.lead.amin(dim=1).cpu().numpy()
        self.counts.update(actions=len(ids), calls=1, passes=answer.passes, doubtful=int(answer.doubtful.sum()))
        if draft is not None:
            self.counts["confirmed"] += int((draft == ids).cumprod(dim=1).sum())
        if self.drafting:
            self._remember(names, ids)
        return ids.numpy()

    def _draft(self, names: Sequence[Hashable]) -> torch.Tensor:
        """(B, action_dim): what each named episode was answered last; to the others the middle word, which is no motion."""
        config = self.processor.config
        middle = torch.full((self.processor.action_dim,), config.vocab_size - config.n_action_bins // 2)
        return torch.stack([middle if name is None else self._last.get(name, middle) for name in names])

    def _remember(self, names: Sequence[Hashable], ids: torch.Tensor) -> None:
        for name, row in zip(names, ids, strict=True):
            if name is not None:
                self._last[name] = row
                self._last.move_to_end(name)
        while len(self._last) > REMEMBERED:
            self._last.popitem(last=False)

    def card(self) -> dict[str, Any]:
        """What a result must say about the policy that made it."""
        config = self.processor.config
        return {
            **self._card,
            "unnorm_key": config.unnorm_key,
            "center_crop": config.center_crop,
            "num_images_in_input": config.num_images_in_input,
            "picture": _picture(config),
            "decode": f"greedy over the {config.n_action_bins} action tokens"
            + ", drafted from the last answer and verified" * self.drafting,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": _backend(self.device),
        }


def _picture(config: ProcessorConfig) -> str:
    """What a live frame goes through, in order."""
    crop = f", centre crop of {image.CROP_AREA:.0%} of the area" if config.center_crop else ", no crop"
    return f"JPEG quality {image.JPEG_QUALITY}, Lanczos to {config.image_size} pixels{crop}"


def _backend(device: torch.device) -> str:
    """The library and the hardware that multiply the matrices."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(device)}"
    capability = torch.backends.cpu.get_cpu_capability()  # decides which kernels multiply, and so the last digits
    return f"torch {torch.__version__}, {device.type}, {capability}, {torch.get_num_threads()} threads"
