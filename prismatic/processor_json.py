"""processor.json, read: what lies beside every adapter and checkpoint that was made here."""

import dataclasses
import os
from pathlib import Path

from prismatic.errors import ConfigError
from prismatic.filenames import PROCESSOR
from prismatic.processor import FORMAT, ProcessorConfig
from prismatic.records import read_object, read_record

RESTORE = "restore it from a copy of the folder"


def read_processor(path: Path) -> ProcessorConfig:
    """ConfigError that names the field where it makes no sense, or is of a later format."""
    raw = read_object(path, way_out=RESTORE)
    if raw.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {raw.get('format')}, this version reads {FORMAT}: update the repository")
    if unknown := sorted({*raw} - {f.name for f in dataclasses.fields(ProcessorConfig)}):
        raise ConfigError(
            f"{path} has a field {unknown[0]!r:.40}, which this version doesn't know: update the repository"
        )
    config = read_record(path, ProcessorConfig, way_out=RESTORE)
    if not all(deviation > 0 for tower in config.stds for deviation in tower):
        raise ConfigError(f"{path}: stds has a value that is not above 0: {RESTORE}")
    return config


def processor_home(checkpoint: Path, adapter: Path | None) -> Path | None:
    """The folder whose processor.json counts: the adapter's, else the checkpoint's; None where neither has one."""
    return next(
        (place for place in (adapter, checkpoint) if place is not None and os.path.lexists(place / PROCESSOR)), None
    )
