"""How fast is an action, and what does it take? In: a checkpoint, or random weights of openvla-7b's size. Out: a row a precision, batch size and way.

    plain, plain compiled     transformers' Llama and its generate: eager; with a static cache and torch.compile
    eager, compiled           ours (decode.py); compiled.py on a GPU
    right draft, wrong draft  ours, with a draft of the whole action
    OFT chunk                 the same weights as OpenVLA-OFT: a state, and 8 actions by regression in one forward pass (compiled on a GPU)

The ways of one precision and batch size take turns. Each way's tokens are compared with the plain way's: in float32 they must be the same.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from prismatic.bench.instruments import Row, digits, random_model, release_memory, seconds_in_turns
from prismatic.bench.plain import PlainDecoder
from prismatic.checkpoint import load_vla
from prismatic.errors import ConfigError
from prismatic.filenames import CONFIG
from prismatic.hub import resolve
from prismatic.machine import peak_memory, uses_gpu
from prismatic.models import quantize as quantisation
from prismatic.models.compiled import decoder_for
from prismatic.models.config_file import read_config
from prismatic.models.decode import ActionDecoder
from prismatic.models.quantize import stored_bytes
from prismatic.models.vla import VLA, VLAConfig
from prismatic.normalize import ACTION_DIMENSIONS

ACTION_DIM = len(ACTION_DIMENSIONS)
PROMPT_TOKENS = 30  # of LIBERO's instructions with the prompt around them
DECISIVE = 8  # times the deviation of a random head's other rows
CHUNK, STATE = 8, 8  # actions and numbers of OpenVLA-OFT in LIBERO
WAYS = ("plain", "plain compiled", "eager", "compiled", "right draft", "wrong draft", "OFT chunk")
COMPILED = ("compiled", "right draft", "wrong draft", "OFT chunk")  # where the decoder given is
COLUMNS = (
    "precision", "batch", "way", "weights GB", "peak GB", "first call s", "forward passes", "p50 ms", "p95 ms",
    "actions/s", "× plain", "same tokens %", "note",
)  # fmt: skip
Run = Callable[[], tuple[Any, ...]]  # ids (B, tokens) or a chunk first, forward passes through the language model last
Plain = dict[int, tuple[Any, float]]  # batch size → ids and median seconds of the plain way


def random_actor(config: VLAConfig, *, dtype: torch.dtype, device: torch.device) -> VLA:
    """A model of random weights whose likeliest token is an action, as a trained one's is."""
    vla = random_model(config, dtype=dtype, device=device)
    vla.language_model.lm_head.weight.data[config.vocab_size - config.n_action_bins : config.vocab_size] *= DECISIVE
    return vla.eval().requires_grad_(False)


def inputs(vla: VLA, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts (B, PROMPT_TOKENS) that end in the empty token, and pixels; the time doesn't depend on what they show."""
    config, norm = vla.config, vla.language_model.model.norm.weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, config.vocab_size - config.n_action_bins, (batch, PROMPT_TOKENS), generator=generator)
    ids[:, 0], ids[:, -1] = config.bos_token_id, config.empty_token_id
    shape = (batch, 6 * config.num_images_in_input, config.image_size, config.image_size)
    return ids.to(norm.device), torch.randn(shape, generator=generator).to(norm)


def as_oft(vla: VLA) -> VLA:
    """OpenVLA-OFT on a model's own layers, quantised or not, with a random head and state projector."""
    config = dataclasses.replace(vla.config, action_head="l1", num_actions_chunk=CHUNK, proprio_dim=STATE)
    with torch.device("meta"):
        oft = VLA(config)
    oft.vision_backbone, oft.projector = vla.vision_backbone, vla.projector
    for name, module in vla.language_model.named_modules():
        if not list(module.children()):
            oft.language_model.set_submodule(name, module)
    like = vla.language_model.model.norm.weight
    for head in (oft.action_head, oft.proprio_projector):
        for parameter in head.to_empty(device=like.device).to(like.dtype).parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter, std=0.02)
    return oft.eval().requires_grad_(False)


def way_of(name: str, vla: VLA, batch: int, decoder: ActionDecoder) -> Run:
    """A way of answering this batch; making it, or its first call, may run out of memory or find no compiler. OFT chunk: decoder is of as_oft."""
    ids, pixels = inputs(vla, batch)
    if name.startswith("plain"):
        plain = PlainDecoder(vla, best=name != "plain")
        return lambda: (plain(ids, pixels, ACTION_DIM), ACTION_DIM)
    if name == "OFT chunk":
        state = torch.zeros(batch, STATE, device=ids.device)
        return lambda: decoder.chunk(ids, pixels, state)
    asked, draft = ActionDecoder(vla) if name == "eager" else decoder, None
    if name.endswith("draft"):
        first = vla.config.vocab_size - vla.config.n_action_bins
        answer = ActionDecoder(vla)(ids, pixels, ACTION_DIM).ids
        draft = first + (answer - first + (name == "wrong draft")) % vla.config.n_action_bins
    return lambda: asked(ids, pixels, ACTION_DIM, draft=draft)


def compare(
    vla: VLA,
    precision: str,
    batch: int,
    ways: Sequence[str],
    *,
    rounds: int,
    plain: Plain,
    decoder_of: Callable[[VLA], ActionDecoder],
) -> list[Row]:
    """A row a way, which is timed or says why not. plain is added to where that is one of the ways.

    Peak memory is the most that was reserved of the GPU since this precision was there, or on a CPU held by the process at all.
    """
    device, dtype = (norm := vla.language_model.model.norm.weight).device, norm.dtype
    expected, median = plain.get(batch, (None, None))
    runs, decoder = dict[str, Run](), decoder_of(vla)  # one for all ways: each would compile anew
    rows: dict[str, Row] = {}
    for name in ways:
        print(f"{precision}, batch {batch}: {name}", file=sys.stderr, flush=True)
        row = rows[name] = dict.fromkeys(COLUMNS, "") | {"precision": precision, "batch": batch, "way": name}
        try:
            used = decoder_of(as_oft(vla)) if name == "OFT chunk" else decoder
            run, began = way_of(name, vla, batch, used), time.perf_counter()
            ids, *_, row["forward passes"] = run()
            ids = ids.cpu()
            row["first call s"] = digits(time.perf_counter() - began)
            run()
        except Exception as error:
            row["note"] = sentence(error)
            continue
        runs[name] = run
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory()
        row |= {"weights GB": digits(stored_bytes(vla) / 1e9), "peak GB": digits(peak / 1e9)}
        if name == "plain":
            expected = ids
        if expected is not None and name != "OFT chunk":
            same = (ids == expected).float().mean().item()
            if precision == "none" and dtype == torch.float32 and same < 1:
                raise RuntimeError(f"{name}: {100 * (1 - same):.1f} % of its tokens are not the plain way's")
            row["same tokens %"] = round(100 * same, 1)
        if name in COMPILED:
            row["note"] = used.description
    times = seconds_in_turns(runs, rounds, device)
    if "plain" in times:
        median = float(times["plain"].quantile(0.5))
        plain[batch] = expected, median
    for name, seconds in times.items():
        p50, p95 = (float(seconds.quantile(q)) for q in (0.5, 0.95))
        rows[name] |= {"p50 ms": digits(1e3 * p50), "p95 ms": digits(1e3 * p95)}
        rows[name]["actions/s"] = digits(batch * (CHUNK if name == "OFT chunk" else 1) / p50)
        rows[name]["× plain"] = digits(median / p50) if median else ""
    return list(rows.values())


def sentence(error: Exception) -> str:
    """An error as a cell of a table."""
    return f"{type(error).__name__}: {error}".split("\n")[0].replace("|", "/")


def run(
    checkpoint: str | None,
    *,
    batch_sizes: Sequence[int],
    quantize: Sequence[str],
    compiled: bool,
    num_images_in_input: int,
    rounds: int,
) -> list[Row]:
    """The table. checkpoint None: random on a GPU, the small policy on a CPU. compiled: also what takes a CPU's compiler minutes."""
    device = torch.device("cuda" if uses_gpu() else "cpu")
    checkpoint = checkpoint or ("checkpoints/openvla-tiny" if device.type == "cpu" else "random")
    folder = None if checkpoint == "random" else resolve(checkpoint)
    dtype = torch.bfloat16 if device.type == "cuda" or folder is None else torch.float32
    config = read_config(folder / CONFIG) if folder else VLAConfig(num_images_in_input=num_images_in_input)
    if config.action_head != "tokens":
        raise ConfigError(
            f"{checkpoint} answers with chunks: give one that answers with tokens, which also has an OFT row"
        )
    rows: list[Row] = []
    plain: Plain = {}
    for precision in quantize:
        vla = (
            load_vla(folder, dtype=dtype, device=str(device))
            if folder
            else random_actor(config, dtype=dtype, device=device)
        )
        try:
            vla = quantisation.quantize(vla, precision) if precision != "none" else vla
        except Exception as error:  # no kernel for this device
            rows.append(dict.fromkeys(COLUMNS, "") | {"precision": precision, "note": sentence(error)})
            del vla
            release_memory()
            continue
        vla.eval().requires_grad_(False)
        release_memory()  # from here on its peak counts
        known = WAYS if precision == "none" else WAYS[2:]  # the plain way has no integers
        ways = [name for name in known if compiled or name != "plain compiled"]
        for batch in batch_sizes:
            rows += compare(vla, precision, batch, ways, rounds=rounds, plain=plain, decoder_of=decoder_for)
        del vla  # before the next one is made
        release_memory()
    return rows
