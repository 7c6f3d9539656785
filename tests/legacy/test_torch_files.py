"""Files of torch.save that hold code, or claim memory that they do not fill, are refused."""

import builtins
import os
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from balanced_group_softmax.legacy.torch_files import load_torch


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class State:
    """Pickled as an empty dict with a state, which a reader may set before it looks at it."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return dict, (), {"x": self.state}


def over_and_over() -> Any:
    """A few hundred bytes that stand for 50**20 numbers."""
    value: Any = [1]
    for _ in range(20):
        value = [value] * 50
    return value


def evil(name: str, trap: Path) -> Any:
    system = Call(os.system, f"touch {trap}")
    return {
        "system": system,
        "nested": {"a": [(Call(Call, system),)]},
        "state": State(system),
        "eval": Call(builtins.eval, f"open({str(trap)!r}, 'w')"),
        "module": torch.nn.Linear(2, 2),
        "bytearray": Call(bytearray, 1 << 62),
    }[name]


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before zip"])
@pytest.mark.parametrize("name", ["system", "nested", "state", "eval", "module", "bytearray"])
def test_code_is_refused_and_not_run(tmp_path: Path, name: str, is_zip: bool) -> None:
    path, trap = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"state_dict": {"a": torch.ones(2)}, "x": evil(name, trap)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"evil\.pth: expected tensors and plain values"):
        load_torch(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**10),
        torch.eye(2).to_sparse(),
        torch.zeros(10**10, device="meta"),
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    ],
    ids=["one number repeated", "sparse", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_whose_numbers_are_not_in_the_file_are_refused(
    tmp_path: Path, tensor: torch.Tensor
) -> None:
    path = tmp_path / "large.pth"
    torch.save({"state_dict": [{"a": tensor}]}, path)
    with pytest.raises(ValueError, match=r"large\.pth: expected tensors"):
        load_torch(path)


def test_many_tensors_of_the_same_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.pth"
    one = torch.zeros(1 << 18)
    torch.save({str(i): one for i in range(4)}, path)
    with pytest.raises(ValueError, match="hold, got some of"):
        load_torch(path)
    torch.save({"a": one, "tied": one, "part": one[3:9]}, path)
    assert load_torch(path)["part"].shape == (6,)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1 << 20), tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    assert (tmp_path / "small.pth").stat().st_size < 10_000
    with pytest.raises(ValueError, match="got a compressed archive"):
        load_torch(tmp_path / "small.pth")


@pytest.mark.timeout(60)
def test_lists_named_over_and_over_are_looked_at_once(tmp_path: Path) -> None:
    torch.save(over_and_over(), tmp_path / "laughs.pth")
    assert len(load_torch(tmp_path / "laughs.pth")) == 50


class Admitted:
    """A class that a program lets torch read."""

    made = 0

    def __init__(self) -> None:
        Admitted.made += 1

    def __reduce__(self) -> Any:
        return Admitted, ()


@pytest.fixture
def program() -> Iterator[set[Any]]:
    """A program that lets torch read arrays, which stand-ins have the names of, and a class."""
    before = torch.serialization.get_safe_globals()
    multiarray = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    dtypes = [np.dtype, type(np.dtype("f8"))]
    admitted = [np.ndarray, multiarray._reconstruct, multiarray.scalar, *dtypes, Admitted]
    torch.serialization.add_safe_globals(admitted)
    yield {*before, *admitted}
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def test_what_the_program_admits_is_neither_run_nor_forgotten(
    tmp_path: Path, program: set[Any]
) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"a": torch.ones(1), "x": Admitted()}, path)
    made = Admitted.made
    for skip_records in (False, True):
        with pytest.raises(ValueError, match=r"theirs\.pth: expected tensors and plain values"):
            load_torch(path, skip_records=skip_records)
        assert Admitted.made == made
        assert set(torch.serialization.get_safe_globals()) == program
    assert isinstance(torch.load(path, weights_only=True)["x"], Admitted)


def test_threads_leave_what_the_program_admits(tmp_path: Path, program: set[Any]) -> None:
    path = tmp_path / "epoch_1.pth"
    torch.save({"a": torch.ones(1), "log": [0.1] * 1000}, path)
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: load_torch(path, skip_records=True), range(64)))
        assert set(torch.serialization.get_safe_globals()) == program


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="since torch 2.5")
def test_records_are_passed_over_whatever_the_program_admits(
    tmp_path: Path, program: set[Any]
) -> None:
    path = tmp_path / "epoch_1.pth"
    torch.save({"a": torch.ones(1), "log": np.arange(3.0), "lr": np.float64(0.1)}, path)
    for _ in range(50):  # which of two of one name torch took hung on where they lay in memory
        assert not isinstance(load_torch(path, skip_records=True)["log"], np.ndarray)
    assert set(torch.serialization.get_safe_globals()) == program


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before zip"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(tmp_path: Path, share: float, is_zip: bool) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.pth: expected .* truncated"):
        load_torch(path)
