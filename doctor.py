"""Is this machine ready, is the data right, would the scores be? One line a check, with what to do; exit 1 if a score would be wrong or
nothing would run, 2 if training on the data would be.

python doctor.py                                   versions, pins, renderer, golden frame, GPU
python doctor.py --checkpoint FOLDER_OR_HUB_ID     also: does the checkpoint load, has it statistics, does it look at the picture
python doctor.py --data_root_dir datasets --dataset_name NAME    also: one page about the data, and what of it would hurt
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import WORKSPACE, FinetuneConfig, GripperConvention
from prismatic import machine
from prismatic.errors import ConfigError, exit_codes
from prismatic.ranges import ActionHead, Few, Images, checked, command_line
from prismatic.scene.renderer import choose_renderer, draws_in_software
from prismatic.scene.suites import Libero
from prismatic.versions import SIMULATOR_PINS, versions

if TYPE_CHECKING:  # they cost seconds
    from prismatic.data.frames import FrameCache
    from prismatic.processor import Processor

OLDEST_CUDA_13_DRIVER = 580  # major version of NVIDIA's driver


@dataclass(frozen=True)
class DoctorConfig:
    # Checkpoint folder, adapter folder or hub id to look at.
    checkpoint: str | None = None
    # Adapter folder to go on top.
    adapter: Path | None = None
    # Key of the data set's statistics, where the checkpoint has several.
    unnorm_key: str | None = None
    # Of a foreign checkpoint: its head, where it could be of more than one kind, and what a call reads and gives. None: as the folder says, else
    # as published.
    action_head: ActionHead | None = None
    num_actions_chunk: Few | None = None
    num_images_in_input: Images | None = None
    # Folder of data sets (RLDS or LeRobot) to look at, or the hub id of such data. None: finetune.py's, where dataset_name is given.
    data_root_dir: str | None = None
    # Data set in it, or several as finetune.py takes them. None: libero_spatial_no_noops, where data_root_dir is given.
    dataset_name: str | None = None
    # Fields of the data set, where they have no usual names: image=…,wrist=…,state=…,action=…,instruction=… (finetune.py takes the same).
    data_keys: str = ""
    # How the data set writes its gripper. auto: found from its values, and said.
    gripper: GripperConvention = "auto"
    # Turn each image by 180°.
    rotate_images: bool = False
    # Folder of frame caches; finetune.py finds what is read here.
    cache_dir: Path = WORKSPACE / "cache"
    # Folder for the page about the data set, an HTML and a PNG file.
    page_dir: Path = WORKSPACE / "doctor"
    # Start the simulator: the renderer, and one fixed frame compared with a stored one (the golden frame).
    simulator: bool = True


@dataclass(frozen=True)
class Check:
    """One line. `good`: True, False (a score would be wrong, or nothing would run), or None for a fact."""

    good: bool | None
    text: str
    remedy: str = ""
    about_data: bool = False  # if not good, it is training that would be wrong


def main(cfg: DoctorConfig) -> int:
    cfg = checked(cfg)
    if cfg.adapter and not cfg.checkpoint:
        raise ConfigError(
            f"--adapter {cfg.adapter} goes on a checkpoint: give --checkpoint, or the adapter as --checkpoint"
        )
    bad = wrong_data = 0
    for check in checks(cfg):
        mark = {True: "ok  ", False: "BAD ", None: "    "}[check.good]
        print(mark + check.text + (f": {check.remedy}" if check.good is False and check.remedy else ""), flush=True)
        bad += check.good is False
        wrong_data += check.good is False and check.about_data
    print(f"{bad} checks failed" if bad else "all checks passed")
    return 2 if wrong_data else int(bad > 0)


def checks(cfg: DoctorConfig) -> Iterator[Check]:
    """Those that cfg asks for, in order of cost."""
    yield from libraries()
    yield from gpus()
    caches = []
    asked = cfg.data_root_dir or cfg.dataset_name
    for part in (cfg.dataset_name or FinetuneConfig.dataset_name).split(",") if asked else ():
        try:
            caches.append(opened(cfg, part))
            yield from data(cfg, caches[-1])
        except ConfigError as error:
            yield Check(False, str(error), about_data=True)
    if cfg.checkpoint:
        yield from policy(cfg, caches)
    if cfg.simulator:
        yield from scenes()


def libraries() -> Iterator[Check]:
    known = versions()
    named = ("python", "torch", "torchvision", "timm", "transformers", "peft", "numpy", "libero")
    yield Check(None, ", ".join(f"{name} {known[name]}" for name in named))
    for name, pinned in SIMULATOR_PINS.items():
        remedy = f"scores differ with another version; pip install {name}=={pinned}"
        yield Check(known[name] == pinned, f"{name} {known[name]}, pinned {pinned}", remedy)
    try:  # one that was built for another torch fails in ways of its own
        import torchvision  # noqa: F401  (before the first osmesa context: afterwards it crashes)

        paired = hasattr(torch.ops.torchvision, "nms")
    except (ImportError, OSError, RuntimeError, AttributeError):
        paired = False
    yield Check(paired, "torch and torchvision belong together", "install both from the same index")


def gpus() -> Iterator[Check]:
    found = machine.gpus()
    if not found:
        yield Check(None, "no GPU: training and acting run on the CPU (a small model only)")
        return
    yield from (Check(None, f"GPU {gpu}") for gpu in found)
    driver = str(found[0].get("driver", "0")).split(".")[0]
    cuda = torch.version.cuda or "none"
    old = cuda.startswith("13") and driver.isdigit() and int(driver) < OLDEST_CUDA_13_DRIVER
    text = f"torch was built for CUDA {cuda}, driver {driver}"
    yield Check(torch.cuda.is_available() and not old, text, machine.NEWER_DRIVER)
    numbers = "MUJOCO_EGL_DEVICE_ID chooses where frames are drawn, CUDA_VISIBLE_DEVICES where the model runs"
    yield Check(None, f"CUDA's and EGL's device numbers differ: {numbers}")


def opened(cfg: DoctorConfig, part: str) -> "FrameCache":
    """A data set, name or name:weight, as training would read it."""
    from prismatic.data.mixture import names_and_weights, open_cache

    ((name, _),) = names_and_weights(part)
    how = {"data_keys": cfg.data_keys, "gripper": cfg.gripper, "rotate_images": cfg.rotate_images}
    root = cfg.data_root_dir or str(FinetuneConfig.data_root_dir)
    return open_cache(root, name, cache_dir=cfg.cache_dir, **how)


def data(cfg: DoctorConfig, cache: "FrameCache") -> Iterator[Check]:
    """What training would read, read: the page, and each finding as a line. ConfigError where it can't be."""
    from prismatic.data.look import look
    from prismatic.data.mixture import sentences
    from prismatic.pages.dataset import write_page

    found, reading = look(cache), sentences(cache, rotate_images=cfg.rotate_images)
    page, sheet = write_page(cache, found, reading, cfg.page_dir)
    yield from (Check(None, sentence) for sentence in reading)
    for finding in found.findings:
        if finding.severity == "wrong":
            yield Check(False, finding.text, finding.remedy, about_data=True)
        else:
            yield Check(None, f"{finding.text} ({finding.remedy})")
    yield Check(True, f"data set {cache.name} was read to its end; {page} and {sheet} show it")


def policy(cfg: DoctorConfig, caches: "list[FrameCache]") -> Iterator[Check]:
    """Does it load, with which head and statistics; what would go wrong with the data that is given, and does it look at the picture."""
    from prismatic.checkpoint import load_policy

    choice = {name: getattr(cfg, name) for name in ("action_head", "num_actions_chunk", "num_images_in_input")}
    try:
        loaded = load_policy(str(cfg.checkpoint), adapter=cfg.adapter, unnorm_key=cfg.unnorm_key, **choice)
    except ConfigError as error:
        yield Check(False, str(error))
        return
    acts = loaded.processor.config
    yield Check(True, f"{cfg.checkpoint} loads, statistics {acts.unnorm_key}")
    state = f" and a state of {acts.proprio_dim} numbers" if acts.proprio_dim else ", no state"
    reads = f"{acts.num_images_in_input} images{state}"
    gives = f"chunks of {acts.num_actions_chunk} actions of {loaded.processor.action_dim} numbers"
    yield Check(None, f"its head is {acts.action_head}: {gives} from {reads}")
    for name, value in loaded.metadata()["assumed"].items():
        yield Check(None, f"its folder doesn't say {name}: {value} is assumed, as published (--{name} says otherwise)")
    for cache in caches:
        yield from fits(cache, loaded.processor)
    ids = torch.tensor([loaded.processor.prompt_ids("pick up the black bowl")], device=loaded.device)
    kind: dict[str, Any] = {"device": loaded.device, "dtype": loaded.dtype}
    pixels = torch.ones(1, 6 * loaded.num_images, acts.image_size, acts.image_size, **kind)
    state = torch.zeros(1, acts.proprio_dim, **kind) if acts.proprio_dim else None
    with torch.inference_mode():
        black, white = (loaded.vla(ids, None, level * pixels, proprio=state).logits[0, -1] for level in (-2.0, 2.0))
    change = (black - white).abs().max().item()
    text = f"a black and a white picture change the logits by up to {change:.3g}"
    yield Check(change > 1e-3, text, "the picture is ignored: the vision weights are wrong")


def fits(cache: "FrameCache", processor: "Processor") -> Iterator[Check]:
    """Whether a data set has what a policy reads, and is one that it learnt from. Acting on it, as eval.py --open_loop does, would fail otherwise."""
    from prismatic.dataset_statistics import NO_NOOPS

    reads, trained = processor.config, sorted(processor.statistics)
    state, actions = 0 if cache.state is None else cache.state.shape[1], cache.actions.shape[1]
    if reads.num_images_in_input > 1 and not cache.has_wrist:
        text = f"{cache.name} has no wrist camera, and the checkpoint looks at {reads.num_images_in_input} images"
        yield Check(False, text, "--data_keys wrist=… names it, or take another checkpoint")
    if reads.proprio_dim and state != reads.proprio_dim:
        there = f"a state of {state} numbers" if state else "no state"
        text = f"{cache.name} has {there}, and the checkpoint reads one of {reads.proprio_dim}"
        yield Check(False, text, "--data_keys state=… names it, or take another checkpoint")
    if actions != processor.action_dim:
        text = f"{cache.name} has actions of {actions} numbers, and the checkpoint answers with {processor.action_dim}"
        yield Check(False, text, "--data_keys action=… names another field, or take another checkpoint")
    same = cache.name.removesuffix(NO_NOOPS) == str(reads.unnorm_key).removesuffix(NO_NOOPS)
    remedy = f"it has statistics of {', '.join(trained)} alone: fine-tune it on {cache.name} first"
    text = f"the checkpoint acts with the statistics of {reads.unnorm_key}, the data set is {cache.name}"
    yield Check(same, text, f"--unnorm_key {cache.name}" if cache.name in trained else remedy)


def scenes() -> Iterator[Check]:
    try:
        renderer = choose_renderer()
    except ConfigError as error:
        yield Check(False, str(error))
        return
    yield Check(True, f"renderer {renderer}")
    drawn = Libero().golden_frame()
    software = draws_in_software(renderer, drawn["gl_renderer"])
    yield Check(None, f"frames are drawn by {drawn['gl_renderer']}" + ", without a GPU: right, but slow" * software)
    text = f"golden frame differs by {drawn['differs_by']:.3f} of 255 (at most {drawn['at_most']})"
    yield Check(drawn["as_expected"], text, "another mujoco, driver or asset: do not compare scores")


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main(command_line(DoctorConfig, __doc__)))
