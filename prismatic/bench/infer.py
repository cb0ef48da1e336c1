"""How fast is an action, and what does it take? In: a checkpoint, or random weights of openvla-7b's size. Out: a row a precision, batch size and way.

    plain, plain compiled     transformers' Llama and its generate: eager; with a static cache and torch.compile
    eager, compiled           ours (decode.py); compiled.py on a GPU
    right draft, wrong draft  ours, with a draft of the whole action
    OFT chunk                 the same weights as OpenVLA-OFT: a state, and 8 actions by regression in one forward pass

The ways of one precision and batch size take turns. Each way's tokens are compared with the plain way's: in float32 they must be the same.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prismatic.bench import instruments
from prismatic.bench.instruments import HostMemory, Row, digits, random_model, seconds_in_turns
from prismatic.bench.plain import PlainDecoder
from prismatic.checkpoint import load_vla
from prismatic.errors import ConfigError
from prismatic.filenames import CONFIG
from prismatic.hub import resolve
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
COLUMNS = (
    "precision", "batch", "way", "weights GB", "peak GB", "first call s", "forward passes", "first token ms", "p50 ms", "p95 ms",
    "actions/s", "× plain", "of floor %", "same tokens %", "note",
)  # fmt: skip
Answer = tuple[torch.Tensor, int]  # ids (B, tokens) or a chunk, and forward passes through the language model
Run = Callable[[int], Answer]  # of so many tokens
Plain = dict[int, tuple[float, torch.Tensor]]  # batch size → median seconds and ids of the plain way


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
    for head in (oft.action_head, oft.proprio_projector):
        instruments.fill_random(head, like=vla.language_model.model.norm.weight)  # type: ignore[arg-type]
    return oft.eval().requires_grad_(False)


def way_of(name: str, vla: VLA, batch: int, decoder: ActionDecoder) -> Run:
    """A way of answering this batch; making it, or its first call, may run out of memory or find no compiler."""
    ids, pixels = inputs(vla, batch)
    first = vla.config.vocab_size - vla.config.n_action_bins
    if name.startswith("plain"):
        plain = PlainDecoder(vla, best=name != "plain")
        return lambda tokens: (plain(ids, pixels, tokens), tokens)
    if name == "OFT chunk":
        oft, state = as_oft(vla), torch.zeros(batch, STATE, device=ids.device)
        return lambda tokens: (oft.predict_chunk(ids, pixels, state), 1)
    if name == "eager":
        decoder = ActionDecoder(vla)
    draft = None
    if name.endswith("draft"):
        answer = ActionDecoder(vla)(ids, pixels, ACTION_DIM).ids
        draft = first + (answer - first + (name == "wrong draft")) % vla.config.n_action_bins

    def run(tokens: int) -> Answer:
        answer = decoder(ids, pixels, tokens, draft=None if draft is None else draft[:, :tokens])
        return answer.ids, answer.forward_passes

    return run


def compare(
    vla: VLA,
    precision: str,
    batch: int,
    ways: Sequence[str],
    *,
    rounds: int,
    plain: Plain,
    decoder: ActionDecoder,
    first_token: bool = True,
) -> list[Row]:
    """A row a way, which is timed or says why not. plain is added to where that is one of the ways. first_token: whether it is timed too, which
    is a shape more to compile.

    Peak memory is, on a GPU, all that the process has reserved by then; on a CPU the weights and what a call takes beside them.
    """
    norm, ready, rows = vla.language_model.model.norm.weight, {}, []
    lengths = (1, ACTION_DIM) if first_token else (ACTION_DIM,)
    for name in ways:
        print(f"{precision}, batch {batch}: {name}", file=sys.stderr, flush=True)
        row: Row = dict.fromkeys(COLUMNS, "") | {"precision": precision, "batch": batch, "way": name}
        rows.append(row)
        try:
            run = way_of(name, vla, batch, decoder)
            began = time.perf_counter()
            run(ACTION_DIM)[0].cpu()
            row["first call s"] = digits(time.perf_counter() - began)
            for tokens in lengths:
                run(tokens)
            with HostMemory() as memory:
                answer, row["forward passes"] = run(ACTION_DIM)
                answer = answer.clone()
        except Exception as error:
            row["note"] = sentence(error)
            continue
        weights = stored_bytes(vla)
        on_gpu = norm.device.type == "cuda"
        peak = torch.cuda.max_memory_reserved(norm.device) if on_gpu else weights + memory.bytes
        row |= {"weights GB": digits(weights / 1e9), "peak GB": digits(peak / 1e9)}
        if name == "plain":
            plain[batch] = float("nan"), answer
        if batch in plain and name != "OFT chunk":
            same = (answer == plain[batch][1]).float().mean().item()
            if precision == "none" and norm.dtype == torch.float32 and same < 1:
                raise RuntimeError(f"{name}: {100 * (1 - same):.1f} % of its tokens are not the plain way's")
            row["same tokens %"] = round(100 * same, 1)
        if name == "compiled":
            row["note"] = decoder.description
        ready[name] = run, row
    times = {
        tokens: seconds_in_turns(
            {name: lambda run=run, n=tokens: run(n) for name, (run, _) in ready.items()}, rounds, norm.device
        )
        for tokens in lengths
    }
    if "plain" in ready:
        plain[batch] = float(times[ACTION_DIM]["plain"].quantile(0.5)), plain[batch][1]
    for name, (_, row) in ready.items():
        p50, p95 = (float(times[ACTION_DIM][name].quantile(q)) for q in (0.5, 0.95))
        if first_token and name != "OFT chunk":
            row["first token ms"] = digits(1e3 * float(times[1][name].median()))
        row |= {"p50 ms": digits(1e3 * p50), "p95 ms": digits(1e3 * p95)}
        row["actions/s"] = digits(batch * (CHUNK if name == "OFT chunk" else 1) / p50)
        if batch in plain:
            row["× plain"] = digits(plain[batch][0] / p50)
    return rows


def sentence(error: Exception) -> str:
    """An error as a cell of a table."""
    return f"{type(error).__name__}: {error}".split("\n")[0].replace("|", "/")


def prompt_flop(config: VLAConfig, tokens: int) -> int:
    """FLOP of one row's first forward pass, counted without computing it."""
    with torch.device("meta"), torch.inference_mode():
        vla = VLA(config).eval()
        pixels = torch.empty(1, 6 * config.num_images_in_input, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            ActionDecoder(vla)(torch.empty(1, tokens, dtype=torch.int64), pixels, 1)
    return counter.get_total_flops()


def floor_seconds(vla: VLA, rates: tuple[float, float]) -> Callable[[int], float]:
    """batch → seconds that no decoder beats without drafts: the decoder's weights read once a further token, the prompt's arithmetic.

    rates: bytes and FLOP a second, measured here.
    """
    layers: nn.Module = vla.language_model.model.layers
    reading = (ACTION_DIM - 1) * stored_bytes(layers) / rates[0]
    prompt = prompt_flop(vla.config, PROMPT_TOKENS - 1) / rates[1]
    return lambda batch: reading + batch * prompt


def run(
    checkpoint: str | None,
    *,
    batch_sizes: Sequence[int],
    quantize: Sequence[str],
    compiled: bool,
    num_images_in_input: int,
    rounds: int,
    plot: Path | None,
) -> list[Row]:
    """The table. checkpoint None: random on a GPU, the small policy on a CPU. compiled: also what takes a CPU's compiler minutes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = checkpoint or ("checkpoints/openvla-tiny" if device.type == "cpu" else "random")
    folder = None if checkpoint == "random" else resolve(checkpoint)
    dtype = torch.bfloat16 if device.type == "cuda" or folder is None else torch.float32
    config = read_config(folder / CONFIG) if folder else VLAConfig(num_images_in_input=num_images_in_input)
    if config.action_head != "tokens":
        raise ConfigError(
            f"{checkpoint} answers with chunks: give one that answers with tokens, which also has an OFT row"
        )
    rates = instruments.bandwidth(device), instruments.matrix_rate(device, dtype)
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
            continue
        vla.eval().requires_grad_(False)
        decoder, floor = decoder_for(vla), floor_seconds(vla, rates)
        known = WAYS if precision == "none" else WAYS[2:]  # the plain way has no integers
        ways = [name for name in known if compiled or name != "plain compiled"]
        for batch in batch_sizes:
            found = compare(vla, precision, batch, ways, rounds=rounds, plain=plain, decoder=decoder)
            for row in found:
                if row["p50 ms"]:
                    row["of floor %"] = round(1e5 * floor(batch) / row["p50 ms"])
            rows += found
        del vla, decoder  # before the next one is made
        instruments.release_memory()
    rows[0]["note"] += f" ceilings: {rates[0] / 1e9:.0f} GB/s, {rates[1] / 1e12:.3g} TFLOP/s ({dtype})"
    if plot:
        draw(rows, plot)
    return rows


def draw(rows: Sequence[Row], file: Path) -> None:
    """Latency of an action against peak memory, a mark a row with numbers, a colour a precision."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    measured = [row for row in rows if row["p50 ms"]]
    for number, precision in enumerate(dict.fromkeys(row["precision"] for row in measured)):
        chosen = [row for row in measured if row["precision"] == precision]
        axes.scatter([r["peak GB"] for r in chosen], [r["p50 ms"] for r in chosen], label=precision, color=f"C{number}")
        for row in chosen:
            axes.annotate(f"{row['way']} ({row['batch']})", (row["peak GB"], row["p50 ms"]), fontsize=6)
    axes.set(xlabel="peak memory, GB", ylabel="median latency of a batch of actions, ms", xscale="log", yscale="log")
    axes.legend(title="weights")
    figure.savefig(file, dpi=150, bbox_inches="tight")
