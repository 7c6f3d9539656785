"""Pickles that hold more than results are refused, and nothing in them is run."""

import builtins
import contextlib
import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from balanced_group_softmax.legacy import safe_pickle

RESULTS = [[np.arange(10, dtype=np.float32).reshape(2, 5), np.zeros((0, 5))], (["a"], b"b", 1.5)]


def load(content: bytes) -> Any:
    return safe_pickle.load(io.BytesIO(content))


def plain(value: Any) -> Any:
    """Arrays in the making become arrays."""
    if isinstance(value, safe_pickle.Array):
        return value.value
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_results_of_every_protocol_are_read(protocol):
    assert_equal(plain(load(pickle.dumps(RESULTS, protocol))), RESULTS)


# Protocols 0 and 1 build objects by `copyreg`, which no results need.
@pytest.mark.parametrize("protocol", [0, 1])
def test_oldest_protocols_hold_lists_and_arrays_too(protocol):
    assert plain(load(pickle.dumps([[1, "a"]], protocol))) == [[1, "a"]]


@given(
    arrays.arrays(
        st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<i8", "|u1", "|b1", "<f2"]),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    st.integers(2, 5),
    st.booleans(),
)
def test_arrays_come_back(array, protocol, fortran):
    array = np.asfortranarray(array) if fortran else array
    found = plain(load(pickle.dumps(array, protocol)))
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_names_of_old_and_new_numpy_are_known(core):
    content = pickle.dumps(RESULTS, 3)
    for name in (b"numpy.core", b"numpy._core"):
        content = content.replace(b"c" + name + b".multi", b"c" + core.encode() + b".multi")
    assert core.encode() in content
    assert_equal(plain(load(content)), RESULTS)


def test_bytes_and_arrays_of_python_2_are_read():
    # What Python 2 writes for np.array([1.0]): raw data as a string of 8-bit characters.
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x00\x00\x00\x00\xf0?tb."
    )
    assert plain(load(content)).tolist() == [1.0]


@pytest.mark.parametrize("value", [np.float32(1.5), np.float64(2), np.int64(3), np.bool_(True)])
def test_scalars_become_numbers(value):
    found = load(pickle.dumps(value))
    assert found == value.item()
    assert type(found) is type(value.item())


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A file that exists once something has run."""
    return tmp_path / "ran"


def evil_pickles(trap: Path) -> dict[str, bytes]:
    command = f"touch {trap}"
    system = Call(os.system, command)
    evaluate = Call(builtins.eval, f"open({str(trap)!r}, 'w')")
    objects = np.empty(1, object)
    objects[0] = system
    return {
        "system": pickle.dumps(system),
        "system in protocol 0": pickle.dumps(system, 0),
        "nested": pickle.dumps([[np.zeros((1, 5)), {"a": ([system],)}]]),
        "call of what a call returns": pickle.dumps(Call(Call, Call(os.system, command))),
        "eval": pickle.dumps(evaluate),
        "eval of Python 2": b"c__builtin__\neval\n(S'open(%r, \"w\")'\ntR." % str(trap),
        "instance": f"(S'{command}'\nios\nsystem\n.".encode(),
        "object array": pickle.dumps(objects),
        "object array in protocol 2": pickle.dumps(objects, 2),
        "argument of an array": pickle.dumps(Call(np.zeros, system)),
        "structured": pickle.dumps(np.zeros(2, [("a", "f4"), ("b", "O")])),
        "getattr": pickle.dumps(Call(getattr, np.ndarray, "tofile")),
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02X\x01\x00\x00\x00aQ.",
    }


NAMES = list(evil_pickles(Path("unused")))


@pytest.mark.parametrize("name", NAMES)
def test_evil_pickles_are_refused_and_not_run(name, trap):
    content = evil_pickles(trap)[name]
    with pytest.raises(ValueError, match="Expected"):
        load(content)
    assert not trap.exists()


def test_the_traps_are_sharp(trap):
    # Else the test above would pass whatever the reader does.
    pickle.loads(evil_pickles(trap)["nested"])
    assert trap.exists()


def test_the_message_names_what_was_asked_for():
    with pytest.raises(ValueError, match=r"got posix\.system; nothing of it was run"):
        load(pickle.dumps(Call(os.system, "true")))


def reconstruct(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


NEW = b"cnumpy.core.multiarray\n_reconstruct\n"
ARRAY = b"cnumpy\nndarray\n"
MADE = NEW + ARRAY + b"K\x00\x85U\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (reconstruct(ARRAY, b"K\x05\x85R"), "another way to make one"),
        (reconstruct(ARRAY, b"}U\x01aK\x01sb"), "changes functions"),
        (reconstruct(NEW, b"}b"), "changes functions"),
        (reconstruct(NEW, b"NN}\x87R"), "plain arrays"),
        (reconstruct(MADE, b"Nb"), "state of an array"),
        (reconstruct(MADE, b"(K\x01K\x02\x85", DTYPE, b"\x89U\x08", bytes(8), b"tb"), "8 bytes"),
        (reconstruct(MADE, b"(K\x01K\x01\x85N\x89U\x08", bytes(8), b"tb"), "array of numbers"),
        (reconstruct(MADE, b"(K\x01K\x01\x85", DTYPE, b"\x89](K\x01etb"), "array of numbers"),
        (reconstruct(b"cnumpy\ndtype\nU\x02O8\x85R"), "dtype 'O8'"),
        (reconstruct(DTYPE, b"(K\x03U\x01<N(U\x01atNtb"), "dtype state"),
        (reconstruct(b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R"), "zlib"),
    ],
    ids=[
        "call",
        "attributes of a type",
        "attributes of a function",
        "kind",
        "state",
        "shape",
        "no dtype",
        "objects",
        "object dtype",
        "fields",
        "codec",
    ],
)
def test_arrays_that_are_not_what_they_seem(content, message):
    pickletools.dis(content, out=io.StringIO())  # it is well-formed
    with pytest.raises(ValueError, match=message):
        load(content)


@pytest.mark.parametrize(
    "claim",
    [b"r\xff\xff\xff\xff", b"p4294967295\n", b"r\x00\x00\x00\x10"],
    ids=["64 GB", "64 GB in text", "4 GB"],
)
def test_places_that_no_value_needs_are_not_reserved(claim):
    with pytest.raises(ValueError, match=r"at most 1[0-9] values, got one of number"):
        safe_pickle.load_plain(io.BytesIO(b"\x80\x02K\x01" + claim + b"."))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("width", [2, 1000])
def test_lists_named_over_and_over_are_not_unfolded(width):
    value = [1] * 10
    for _ in range(14):
        value = [value] * width
    with pytest.raises(ValueError, match="each list once"):
        safe_pickle.load_plain(io.BytesIO(pickle.dumps(value)))
    value.append(value)
    with pytest.raises(ValueError, match="each list once"):
        safe_pickle.load_plain(io.BytesIO(pickle.dumps(value)))


def test_plain_values_come_back():
    value = {0: {"a": [1, 2, 2**40], "b": "x"}, 1: ([], None, 1.5), 2: [[7] * 3] * 2}
    for protocol in range(2, 6):
        assert safe_pickle.load_plain(io.BytesIO(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("length", [0, 1, 10, 100, -20, -1])
def test_truncated_pickles(length):
    content = pickle.dumps(RESULTS)
    for read in (load, lambda content: safe_pickle.load_plain(io.BytesIO(content))):
        with pytest.raises(ValueError, match=r"Expected a pickle, got .* truncated"):
            read(content[:length])


# "r" may ask for a memo of gigabytes.
@given(st.binary(max_size=60).map(lambda content: content.replace(b"r", b"")))
def test_noise_is_refused_or_harmless(content):
    for read in (load, lambda content: safe_pickle.load_plain(io.BytesIO(content))):
        with contextlib.suppress(ValueError):  # and no other error
            read(content)
