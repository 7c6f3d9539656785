"""One process or many: how a process finds its device and its place."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import distributed

CPU = torch.device("cpu")


def test_a_world_size_alone_starts_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers set it where nothing is to be joined."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with distributed.process_group(CPU):
        assert distributed.world_size() == 1
        assert distributed.is_first()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with distributed.process_group(CPU):
        assert torch.distributed.is_initialized()
        assert distributed.gathered("a") == ["a"]
        with pytest.raises(OSError, match="full"):
            distributed.first_does(fails)
    assert not torch.distributed.is_initialized()


def fails() -> None:
    raise OSError("full")


def test_the_error_of_the_first_process_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_first(outcome: Any) -> Any:
        return False, OSError("full")

    monkeypatch.setattr(distributed, "from_first", of_the_first)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with pytest.raises(distributed.FailedElsewhere):
        distributed.first_does(fails)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(OSError, match="full"):
        distributed.first_does(fails)


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Expected `--device` cuda with several processes"):
        distributed.local_device("cuda:1")
    assert distributed.local_device("cpu") == CPU


@pytest.mark.parametrize("name", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="Expected `--device` to be usable, got"):
        distributed.local_device(name)
