"""How fast is an action, and what does it take? In: a checkpoint, or none (random weights of openvla-7b's size). Out: a row for each precision,
batch size and way of decoding.

The ways of one precision and batch size take turns, call by call, so that whatever else the machine does falls on all of them. Before
anything is timed each way's words are compared with the plain way's: in float32 they must be the same.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prismatic.bench import ceilings
from prismatic.bench.load import Peak
from prismatic.bench.plain import PlainDecoder
from prismatic.bench.random_model import random_model
from prismatic.checkpoint import load_vla
from prismatic.filenames import CONFIG
from prismatic.models.compiled import decoder_for
from prismatic.models.config_file import read_config
from prismatic.models.decode import ActionDecoder
from prismatic.models.quantize import quantize, stored_bytes
from prismatic.models.vla import VLA, VLAConfig
from prismatic.normalize import ACTION_DIMENSIONS

ACTION_DIM = len(ACTION_DIMENSIONS)
PROMPT_WORDS = 30  # of LIBERO's instructions with the prompt around them
SEED = 0
DECISIVE = 8  # times the deviation of a random head's other rows

PLAIN = "plain"
Run = Callable[[int], torch.Tensor]  # number of words → ids (B, words)
Row = dict[str, Any]
COLUMNS = (
    "precision", "batch", "way", "weights GB", "peak GB", "first word ms", "p50 ms", "p95 ms", "actions/s", "× plain", "of floor %",
    "same words %", "note",
)  # fmt: skip


def random_full_size(dtype: torch.dtype, device: torch.device) -> VLA:
    """openvla-7b's shapes with random weights, made where they are used; the likeliest word is an action, as in a trained model."""
    vla = random_model(VLAConfig(), dtype=dtype, device=device, seed=SEED)
    first, last = vla.config.vocab_size - vla.config.n_action_bins, vla.config.vocab_size
    with torch.no_grad():
        vla.language_model.lm_head.weight[first:last] *= DECISIVE
    return vla.eval()


def inputs(
    config: VLAConfig, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts (B, PROMPT_WORDS) that end in the empty token, and random pictures; the time doesn't depend on what they show."""
    generator = torch.Generator().manual_seed(SEED)
    words = config.vocab_size - config.n_action_bins
    ids = torch.randint(4, words, (batch, PROMPT_WORDS), generator=generator)
    ids[:, 0], ids[:, -1] = config.bos_token_id, config.empty_token_id
    shape = (batch, 6 * config.num_images_in_input, config.image_size, config.image_size)
    return ids.to(device), torch.randn(shape, generator=generator).to(device, dtype)


def ways(
    vla: VLA, precision: str, ids: torch.Tensor, pixels: torch.Tensor, compiled: Callable[[], ActionDecoder]
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """(name, what makes its run) of every way of decoding this batch, the slowest first. Making one may run out of memory."""

    def stock(*, best: bool) -> Run:
        decoder = PlainDecoder(vla, best=best)
        return lambda words: decoder(ids, pixels, words)

    eager = ActionDecoder(vla)

    def drafted(*, wrong: int) -> Run:
        first = vla.config.vocab_size - vla.config.n_action_bins
        draft = first + (eager(ids, pixels, ACTION_DIM).ids - first + wrong) % vla.config.n_action_bins
        return lambda words: compiled()(ids, pixels, words, draft=draft[:, :words]).ids

    if precision == "none":
        yield PLAIN, lambda: stock(best=False)
        yield "plain, static cache, compiled", lambda: stock(best=True)
    yield "ours, eager", lambda: lambda words: eager(ids, pixels, words).ids
    yield "ours, compiled", lambda: lambda words: compiled()(ids, pixels, words).ids
    yield "ours, compiled + drafting, all right", lambda: drafted(wrong=0)
    yield "ours, compiled + drafting, all wrong", lambda: drafted(wrong=1)


def run(
    folder: Path | None,
    *,
    batch_sizes: Sequence[int],
    precisions: Sequence[str],
    device: str,
    rounds: int,
    compiled: bool = True,
) -> list[Row]:
    """The table. folder None: random weights of full size. rounds: timed calls of each way. compiled: whether to include what takes a compiler
    minutes to get ready on a CPU, the plain way at its best.
    """
    place = torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" or folder is None else torch.float32
    rates = ceilings.bandwidth(place), ceilings.matrix_rate(place, dtype)
    config = VLAConfig() if folder is None else read_config(folder / CONFIG)
    prompt_seconds = ceilings.prompt_flop(config, PROMPT_WORDS - 1) / rates[1]
    rows: list[Row] = []
    plain: dict[int, tuple[float, torch.Tensor]] = {}  # batch → seconds and words of the plain way
    for precision in precisions:
        vla = random_full_size(dtype, place) if folder is None else load_vla(folder, dtype=dtype, device=device).eval()
        vla.requires_grad_(False)
        missing = _quantised(vla, precision)
        for batch in batch_sizes:
            floor = (ACTION_DIM - 1) * ceilings.step_bytes(vla) / rates[0] + batch * prompt_seconds
            if missing:
                rows.append(_skipped(precision, batch, "all", missing))
            else:
                rows += _batch(vla, precision, batch, plain, floor, rounds, compiled)
        del vla  # before the next one is made
        ceilings.release_memory()
    for row in [row for row in rows if row["p50 ms"]][:1]:
        ceiling = f"ceilings: {rates[0] / 1e9:.0f} GB/s, {rates[1] / 1e12:.3g} TFLOP/s ({dtype})"
        row["note"] = ceiling.replace("torch.", "")
    return rows


def _quantised(vla: VLA, precision: str) -> str:
    """Quantise it, in place; why not, where that fails: no such precision, a backend that isn't installed or has no kernel for this device."""
    try:
        if precision != "none":
            quantize(vla, precision)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _batch(
    vla: VLA,
    precision: str,
    batch: int,
    plain: dict[int, tuple[float, torch.Tensor]],
    floor: float,
    rounds: int,
    compiled: bool,
) -> list[Row]:
    """Rows of one precision and batch size. floor: seconds that an action takes at least."""
    norm = vla.language_model.model.norm.weight
    ids, pixels = inputs(vla.config, batch, norm.device, norm.dtype)
    weights = stored_bytes(vla)
    ready: dict[str, tuple[Run, Row]] = {}
    rows = []
    held = _reserved(norm.device)
    decoder = functools.cache(lambda: decoder_for(vla))
    for name, make in ways(vla, precision, ids, pixels, decoder):
        if not compiled and name.startswith("plain, static"):
            rows.append(_skipped(precision, batch, name, "left out: --compiled False"))
            continue
        print(f"{precision}, batch {batch}: {name}", file=sys.stderr, flush=True)
        try:
            call = make()
            words, more = _prepared(call, held, norm.device)
        except Exception as error:  # out of memory, or no compiler
            rows.append(_skipped(precision, batch, name, error))
            continue
        if name == PLAIN:
            plain[batch] = float("nan"), words
        row = _skipped(precision, batch, name, "")
        row |= {"weights GB": _digits(weights / 1e9), "peak GB": _digits((weights + more) / 1e9)}
        if batch in plain:
            same = (words == plain[batch][1]).float().mean().item()
            if precision == "none" and norm.dtype == torch.float32 and same < 1:
                raise RuntimeError(
                    f"{name}, batch {batch}: {100 * (1 - same):.1f} % of its words are not the plain way's"
                )
            row["same words %"] = round(100 * same, 1)
        if name.startswith("ours, compiled"):
            row["note"] = decoder().description
        ready[name] = call, row
        rows.append(row)
        if not name.startswith("ours, compiled"):  # what is drafted stands on the same graphs and cache
            held = _reserved(norm.device)
    print(f"{precision}, batch {batch}: {rounds} actions of each, in turns", file=sys.stderr, flush=True)
    times = _take_turns({name: call for name, (call, _) in ready.items()}, rounds, norm.device)
    if PLAIN in times:
        plain[batch] = float(times[PLAIN][1].quantile(0.5)), plain[batch][1]
    for name, (first, whole) in times.items():
        p50, p95 = (float(whole.quantile(q)) for q in (0.5, 0.95))
        ready[name][1].update(
            {
                "first word ms": _digits(1e3 * float(first.quantile(0.5))),
                "p50 ms": _digits(1e3 * p50),
                "p95 ms": _digits(1e3 * p95),
                "actions/s": _digits(batch / p50),
                "× plain": _digits(plain[batch][0] / p50) if batch in plain else "",
                "of floor %": round(100 * floor / p50),
            }
        )
    return rows


def _reserved(device: torch.device) -> int:
    """Bytes that torch holds on a GPU, the private memory of graphs included; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    ceilings.release_memory()
    return torch.cuda.memory_reserved(device)


def _prepared(call: Run, held: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Run a way until it is warm. Returns its words, and the most bytes that it holds beside the weights; held: before the way was there."""
    for words in (1, ACTION_DIM, ACTION_DIM):
        call(words)
    if device.type == "cuda":
        _reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        answer = call(ACTION_DIM).clone()
        return answer, torch.cuda.max_memory_reserved(device) - held
    with Peak() as peak:
        answer = call(ACTION_DIM).clone()
    return answer, peak.bytes


def _take_turns(
    calls: dict[str, Run], rounds: int, device: torch.device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Seconds to the first word and of whole actions, `rounds` of each way, one after the other."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for words, times in zip((1, ACTION_DIM), taken[name], strict=True):
                ceilings.wait(device)
                start = time.perf_counter()
                call(words)
                ceilings.wait(device)
                times.append(time.perf_counter() - start)
    return {name: (torch.tensor(first), torch.tensor(whole)) for name, (first, whole) in taken.items()}


def _skipped(precision: str, batch: int, way: str, reason: object) -> Row:
    """A row without numbers, which says why; also the form of those with numbers."""
    note = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
    known = {"precision": precision, "batch": batch, "way": way, "note": note.split("\n")[0].replace("|", "/")}
    return {name: known.get(name, "") for name in COLUMNS}


def _digits(number: float) -> float:
    """Three significant digits."""
    return float(f"{number:.3g}")


def plot(rows: Sequence[Row], file: Path) -> None:
    """Latency of an action against peak memory, a mark a row with numbers, a colour a precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    measured = [row for row in rows if row["p50 ms"]]
    for number, precision in enumerate(dict.fromkeys(row["precision"] for row in measured)):
        chosen = [row for row in measured if row["precision"] == precision]
        axes.scatter([r["peak GB"] for r in chosen], [r["p50 ms"] for r in chosen], label=precision, color=f"C{number}")
        for row in chosen:
            axes.annotate(f"{row['way']} ({row['batch']})", (row["peak GB"], row["p50 ms"]), fontsize=6)
    axes.set(xlabel="peak memory, GB", ylabel="median latency of a batch of actions, ms", xscale="log", yscale="log")
    axes.legend(title="weights")
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
