"""A hub without a network: downloads copy from a folder what was asked for, as huggingface_hub's own patterns mean it."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects


def serve(monkeypatch: pytest.MonkeyPatch, repo_id: str, kind: str, *, files: Path, snapshot: Path) -> None:
    """Let snapshot_download of repo_id fetch into snapshot what lies in files."""

    def download(asked: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (asked, repo_type) == (repo_id, kind)
        there = [str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
