"""Weights on disk ↔ a model, tensor by tensor. In: safetensors (one file or shards with an index) or a native Prismatic .pt. Out: a filled VLA.

Everything is checked by name and shape before the first tensor is read, so nothing is ever half-loaded; tensors go straight from the mapped
file into place, so host memory holds the model once.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from huggingface_hub import save_torch_state_dict
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from prismatic.errors import ConfigError
from prismatic.filenames import ADAPTER_WEIGHTS, ADAPTER_WEIGHTS_BIN, CONFIG, NATIVE_WEIGHTS, WEIGHTS, WEIGHTS_INDEX
from prismatic.models import nf4
from prismatic.records import read_record, regular_file
from prismatic.sums import check_sum

SHARD_BYTES = 5 * 10**9  # a shard that export writes is at most this large
SMALLEST_MATRIX = 256  # values: a smaller one, such as a class token's place, may be zero
ANOTHER_COPY = "copy the weights again, or take an earlier step's"
NO_TENSORS = f"holds no tensors: {ANOTHER_COPY}"
FINGERPRINT_VALUES = 512  # of each tensor go into the fingerprint of a checkpoint
FORMAT = {"format": "pt"}  # what transformers looks for
NATIVE = "model."  # the part of a native Prismatic file that is read
NATIVE_NAMES = (  # its prefix → published prefix, and the projector's Sequential indices
    ("vision_backbone.dino_featurizer.", "vision_backbone.featurizer."),
    ("vision_backbone.siglip_featurizer.", "vision_backbone.fused_featurizer."),
    ("projector.projector.0.", "projector.fc1."),
    ("projector.projector.2.", "projector.fc2."),
    ("projector.projector.4.", "projector.fc3."),
    ("llm_backbone.llm.", "language_model."),
)


class _Index(TypedDict):
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: where it is, its shape, and how to read it (mapped, not copied)."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def load(
        self,
        name: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        may_be_zero: bool = False,
        exact: bool = False,
    ) -> torch.Tensor:
        """A copy in dtype on device. ConfigError for NaN or infinity, whole numbers, or a matrix of zeros: any would act, badly.

        exact: of a quantised layer's part, which is stored in this very dtype.
        """
        stored = self.read()
        if stored.dtype != dtype if exact else not stored.is_floating_point():
            wanted = dtype if exact else "a floating one"
            raise ConfigError(f"{self.file}: tensor {name} has dtype {stored.dtype}, not {wanted}: {ANOTHER_COPY}")
        tensor = stored.to(device=device, dtype=dtype, copy=True)
        if not tensor.is_floating_point():
            return tensor
        # One pass over the copy: a norm is finite where every value is, unless their squares overflow, and 0 where all are.
        norm = torch.linalg.vector_norm(tensor).item()
        if not math.isfinite(norm) and not torch.isfinite(tensor).all():
            raise ConfigError(f"{self.file}: tensor {name} holds NaN or infinity: {ANOTHER_COPY}")
        matrix = tensor.dim() > 1 and tensor.numel() >= SMALLEST_MATRIX
        if matrix and not may_be_zero and norm == 0 and not tensor.any():
            raise ConfigError(f"{self.file}: tensor {name} is zero everywhere: {ANOTHER_COPY}")
        return tensor


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder under its published name, read lazily. ConfigError for a missing or truncated file."""
    if (folder / WEIGHTS_INDEX).exists():
        names = set(read_record(folder / WEIGHTS_INDEX, _Index)["weight_map"].values())
        if outside := sorted(
            name for name in names if Path(name).name != name or name in ("", "..") or len(name) > 255
        ):
            raise ConfigError(
                f"{folder / WEIGHTS_INDEX} names {outside[0]!r}, which is not in its folder: copy it again"
            )
        files = [folder / name for name in sorted(names)]
    elif (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif native := sorted((folder / "checkpoints").glob("*.pt")):
        path = next((path for path in native if path.name == NATIVE_WEIGHTS), native[-1])
        found = read_pickle(path, "Prismatic checkpoint")
        return {
            _published_name(name.removeprefix(NATIVE)): tensor
            for name, tensor in found.items()
            if name.startswith(NATIVE)
        }
    else:
        raise ConfigError(
            f"{folder} holds no weights: expected {WEIGHTS}, {WEIGHTS_INDEX} with its shards, or checkpoints/*.pt"
        )
    found = [pair for path in files for pair in read_safetensors(path)]
    if len(tensors := dict(found)) < len(found):
        raise ConfigError(f"{folder}: two shards hold a tensor of one name: copy the shards of one model")
    return tensors


def read_safetensors(path: Path) -> Iterable[tuple[str, StoredTensor]]:
    """(name, tensor) of one safetensors file, read lazily. ConfigError if it is missing, truncated, not as it was written, or a pointer."""
    _check_file(path)
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or truncated ({error}): copy it again") from None
    if not handle.keys():
        raise ConfigError(f"{path} {NO_TENSORS}")
    for name in handle.keys():  # noqa: SIM118  (no dict: it can't be iterated itself)
        shape = tuple(handle.get_slice(name).get_shape())
        yield name, StoredTensor(path, shape, lambda name=name: handle.get_tensor(name))


def _check_file(path: Path) -> None:
    """ConfigError for a file that is missing, unreadable, a pipe, a pointer, or not as it was written."""
    if not path.exists():
        raise ConfigError(f"{path} is missing: copy the folder again, with all of its files")
    with regular_file(path):
        pass
    check_sum(path)


def read_pickle(path: Path, what: str) -> dict[str, StoredTensor]:
    """Every tensor of a pickle, the keys of nested ones joined by dots: mapped, and read with weights_only so that it can run no code."""
    _check_file(path)
    try:
        found = dict(_leaves(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True)))
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ConfigError(f"{path} is no readable {what} ({str(error).splitlines()[0]}): copy it again") from None
    if not found:
        raise ConfigError(f"{path} {NO_TENSORS}")
    return found


def _leaves(path: Path, value: Any, name: str = "") -> Iterator[tuple[str, StoredTensor]]:
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} is sparse, or a shape without numbers")
        yield name, StoredTensor(path, tuple(value.shape), value.detach)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(path, inner, f"{name}.{key}" if name else str(key))


def adapter_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of an adapter folder under peft's name: adapter_model.safetensors, or the .bin of older versions."""
    if (folder / ADAPTER_WEIGHTS).exists() or not (folder / ADAPTER_WEIGHTS_BIN).is_file():
        return dict(read_safetensors(folder / ADAPTER_WEIGHTS))
    return read_pickle(folder / ADAPTER_WEIGHTS_BIN, "adapter")


def _published_name(native: str) -> str:
    for prefix, published in NATIVE_NAMES:
        if native.startswith(prefix):
            native = published + native.removeprefix(prefix)
    return native.removesuffix(".gamma") + ".scale_factor" if native.endswith(".gamma") else native


def check_names(
    expected: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor], folder: Path, *, described_by: str = CONFIG
) -> None:
    """ConfigError that names the first missing, surplus or mis-shaped tensor and its file; described_by: what makes them expected."""
    for name, shape in expected.items():
        if name not in stored:
            raise ConfigError(
                f"{folder}: tensor {name} is missing: {described_by} describes another model, or a shard was lost"
            )
        if stored[name].shape != shape:
            raise ConfigError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, but {described_by} makes it {list(shape)}"
            )
    if surplus := sorted(set(stored) - set(expected)):
        raise ConfigError(
            f"{stored[surplus[0]].file}: tensor {surplus[0]} has no place in the model of {described_by} ({len(surplus)} such)"
        )


def fill(model: nn.Module, stored: dict[str, StoredTensor], *, dtype: torch.dtype, device: torch.device | str) -> None:
    """Replace every (meta) parameter of model by its stored tensor, cast to dtype on device, one at a time; a quantised layer's parts as they are.

    A parameter that is sharded over processes has its place already: its own piece is copied in. One that is kept in 4 bits is packed.
    """
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in stored.items():
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        place = getattr(module, last)
        if name in buffers:
            part = tensor.load(name, dtype=place.dtype, device=device, may_be_zero=True, exact=True)
            setattr(module, last, part)
        elif nf4.is_packed(module, last):
            nf4.pack(module, tensor.load(name, dtype=dtype), device)
        elif hasattr(place, "placements"):
            from torch.distributed.tensor import distribute_tensor  # here, because it is slow to import and few need it

            whole = tensor.load(name, dtype=dtype)
            with torch.no_grad():
                place.copy_(distribute_tensor(whole, place.device_mesh, place.placements, src_data_rank=None))
        else:
            setattr(module, last, nn.Parameter(tensor.load(name, dtype=dtype, device=device)))


def stored_dtype(stored: dict[str, StoredTensor]) -> torch.dtype:
    """Number format of a checkpoint: that of its first tensor; of 8 bits bfloat16, which holds their every value and can be computed in."""
    dtype = next(iter(stored.values())).read().dtype
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def fingerprint(stored: dict[str, StoredTensor]) -> str:
    """Hash of names, shapes and the first values of every tensor (as float32): equal however the same weights are stored."""
    digest = hashlib.sha256()
    for name in sorted(stored):
        head = stored[name].read().reshape(-1)[:FINGERPRINT_VALUES].float().contiguous()
        digest.update(f"{name} {stored[name].shape} ".encode())
        digest.update(head.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file."""
    save_file(tensors, path, metadata=FORMAT)
    _open_to_others(path)


def save_weights(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write model.safetensors, or shards of at most SHARD_BYTES with their index, as transformers does."""
    # a piece of a larger storage, as gathered shards are, is refused: it gets one of its own
    whole = {name: tensor.untyped_storage().nbytes() == tensor.nbytes for name, tensor in state.items()}
    state = {name: tensor if whole[name] else tensor.clone() for name, tensor in state.items()}
    save_torch_state_dict(state, folder, max_shard_size=SHARD_BYTES, metadata=dict(FORMAT))
    for path in folder.glob("*.safetensors"):
        _open_to_others(path)


def _open_to_others(path: Path) -> None:
    """Give a file the permissions that any new file gets: safetensors leaves it to its owner alone."""
    mask = os.umask(0)  # there is no other way to read it
    os.umask(mask)
    path.chmod(0o666 & ~mask)
