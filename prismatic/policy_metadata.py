"""What a result says about the model that acted: what a frame went through, how it decoded, what multiplied the matrices."""

from typing import Any

import torch

from prismatic import image, normalize
from prismatic.models.vla import VLA
from prismatic.processor import Processor, ProcessorConfig

OF_THE_PROCESSOR = (
    "unnorm_key", "center_crop", "num_images_in_input", "action_head", "num_actions_chunk", "proprio_dim",
)  # fmt: skip


def describe(vla: VLA, processor: Processor, *, drafting: bool) -> dict[str, Any]:
    """The part of a policy's metadata that doesn't say where its weights came from."""
    config, first = processor.config, next(vla.parameters())
    crop = f", centre crop of {image.CROP_AREA:.0%} of the area" if config.center_crop else ", no crop"
    return {
        **{name: getattr(config, name) for name in OF_THE_PROCESSOR},
        "action_dim": processor.action_dim,
        "gripper_dims": normalize.gripper_dims(processor.action_statistics()),
        "picture": f"JPEG quality {image.JPEG_QUALITY}, Lanczos to {config.image_size} pixels{crop}",  # of a live frame
        "decode": _decoding(config, drafting=drafting),
        "device": str(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "backend": _backend(first.device),
    }


def _decoding(config: ProcessorConfig, *, drafting: bool) -> str:
    chunk = f"{config.num_actions_chunk} actions in one forward pass"
    if config.action_head == "l1":
        return f"{chunk}, regressed"
    tokens = f"greedy over the {config.n_action_bins} action tokens"
    if config.action_head == "parallel":
        return f"{chunk}, {tokens}"
    return tokens + ", drafted from the last answer and verified" * drafting


def _backend(device: torch.device) -> str:
    """The library and the hardware that multiply the matrices."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(device)}"
    capability = torch.backends.cpu.get_cpu_capability()  # decides which kernels multiply, and so the last digits
    return f"torch {torch.__version__}, {device.type}, {capability}, {torch.get_num_threads()} threads"
