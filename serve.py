"""Serve a policy to robots and harnesses that already speak to one: OpenVLA's and OpenVLA-OFT's /act, openpi's and vla-eval's WebSockets.

    python serve.py --pretrained_checkpoint FOLDER_OR_HUB_ID [--lora_checkpoint …] [--quantize int8]

Requests that arrive together are answered in one batch. Only this machine may ask, unless there is an API key (docs/serve.md).
SIGTERM finishes what is under way and leaves with 143.
"""

import asyncio
import logging
import os
import shlex
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from prismatic.errors import ConfigError, exit_codes
from prismatic.ranges import ActionHead, BatchSize, Few, Images, Positive, checked, command_line
from prismatic.serving.guard import KEY_VARIABLE, read_key
from prismatic.serving.observation import Limits


@dataclass(frozen=True)
class ServeConfig:
    # Checkpoint folder, adapter folder (it knows its base), or hub id such as openvla/openvla-7b-finetuned-libero-spatial.
    pretrained_checkpoint: str
    # Adapter folder that goes on top of the checkpoint.
    lora_checkpoint: Path | None = None
    # Weights in 8 or 4 bits. A folder that export.py quantised needs no flag.
    quantize: Literal["none", "int8", "int4"] = "none"
    # Key of the data set's statistics: for a foreign folder that has several, or a policy that learnt from several data sets.
    unnorm_key: str | None = None
    # Whether it was trained with random crops. None: what the folder says, True where it says nothing.
    center_crop: bool | None = None
    # Of a foreign folder with one of OpenVLA-OFT's heads that doesn't say so: its head, actions an answer, and images. None: as published.
    action_head: ActionHead | None = None
    num_actions_chunk: Few | None = None
    num_images_in_input: Images | None = None
    # Address to listen at. Another one than this machine's own (127.0.0.1) demands an API key.
    host: str = "127.0.0.1"
    # Port to listen at; 0 takes a free one.
    port: Annotated[int, Meta(ge=0, lt=2**16)] = 8000
    # File that holds the API key, which the environment variable OPENVLA_API_KEY may hold instead.
    api_key_file: Path | None = None
    # Most requests of one batch.
    max_batch: BatchSize = 16
    # Longest that a request waits for others to come along, in ms. A client alone doesn't wait.
    max_wait_ms: Annotated[float, Meta(ge=0, le=1000)] = 5.0
    # Folder in which to write each request and answer.
    record: Path | None = None
    # Largest image, in pixels.
    max_pixels: Positive = Limits.pixels
    # Most connections at a time.
    max_connections: Positive = Limits.connections


def main(cfg: ServeConfig) -> None:
    cfg = checked(cfg)
    key = read_key(cfg.api_key_file, cfg.host)
    listener = bind(cfg.host, cfg.port)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("serve.access").setLevel(logging.INFO)

    from prismatic.checkpoint import load_policy
    from prismatic.serving.app import Server
    from prismatic.serving.recording import Recorder
    from prismatic.serving.service import Service, WarmUp

    recorder = None if cfg.record is None else Recorder(cfg.record)
    start = time.monotonic()
    names = ("unnorm_key", "center_crop", "quantize", "action_head", "num_actions_chunk", "num_images_in_input")
    choice = {name: getattr(cfg, name) for name in names}
    policy = load_policy(cfg.pretrained_checkpoint, adapter=cfg.lora_checkpoint, **choice)
    print(f"loaded {cfg.pretrained_checkpoint} in {time.monotonic() - start:.1f} s", flush=True)
    service = Service(
        policy,
        Limits(pixels=cfg.max_pixels, connections=cfg.max_connections),
        max_batch=cfg.max_batch,
        max_wait=cfg.max_wait_ms / 1000,
        prepare=policy.processor.image_path,
        recorder=recorder,
        warm_ups=3 if policy.device.type == "cuda" else 1,
    )

    def announce(times: WarmUp) -> None:
        sizes = ", ".join(f"{rows} in {seconds:.2f} s" for rows, seconds in times)
        print(f"warmed up with batches of {sizes}", *addresses(cfg, listener.getsockname()[1]), sep="\n", flush=True)

    asyncio.run(Server(service, key).run_until_stopped(listener, announce))


def bind(host: str, port: int) -> socket.socket:
    """A socket that doesn't listen yet: a port that is taken is known before the weights are loaded. ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Unless the protocol is named, asyncio leaves Nagle's algorithm on: 40 ms more on each answer of a kept connection.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Its connections inherit this: the kernel asks a silent peer whether it is still there, and closes after some two minutes without an answer.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
    try:
        listener.bind((host.strip("[]"), port))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"can't listen at --host {host} --port {port} ({reason}): give another port or host"
        ) from None
    return listener


def addresses(cfg: ServeConfig, port: int) -> list[str]:
    """Where each dialect is answered, and a command that asks."""
    host = f"[{cfg.host.strip('[]')}]" if ":" in cfg.host else cfg.host
    url = f"http://{host}:{port}"
    secret = f"$(cat {shlex.quote(str(cfg.api_key_file))})" if cfg.api_key_file else f"${KEY_VARIABLE}"
    key = f'-H "Authorization: Api-Key {secret}" ' if cfg.api_key_file or os.environ.get(KEY_VARIABLE) else ""
    return [
        f"page          {url}/",
        f"OpenVLA, OFT  POST {url}/act",
        f"openpi        ws://{host}:{port}",
        f"vla-eval      ws://{host}:{port}/vla-eval (or without the path)",
        "try it:",
        f"curl -s {key}{url}/example | curl -s {key}-H 'Accept: application/json' --data-binary @- {url}/act",
    ]


if __name__ == "__main__":
    with exit_codes():
        main(command_line(ServeConfig, __doc__))
