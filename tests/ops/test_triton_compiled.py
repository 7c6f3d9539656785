"""Machine code of the Triton kernels, made without a GPU: no spills, whole vectors, no atomics.

`compile_ahead.py` compiles them; here is read what came of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PROGRAM = Path(__file__).with_name("compile_ahead.py")
CAPABILITIES = (80, 90)
CONTROL = "starved of registers"
Report = dict[str, Any]

every_capability = pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Report]]:
    """For each capability every kernel that was compiled; both at once, a minute or two."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton is not installed")
    programs = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "cuobjdump") if not (programs / name).exists()]
    if missing:
        pytest.skip(f"this Triton brings no {' and no '.join(missing)}")
    folder = tmp_path_factory.mktemp("compiled")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_DISABLE_LINE_INFO": "1",  # half the text, and a little faster
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    running = {
        capability: subprocess.Popen(
            [sys.executable, str(PROGRAM), str(capability), str(folder / f"{capability}.json")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for capability in CAPABILITIES
    }
    try:
        for capability, process in running.items():
            output, _ = process.communicate()
            assert process.returncode == 0, f"sm_{capability} failed:\n{output[-6000:]}"
    finally:
        for process in running.values():
            process.kill()
    return {c: json.loads((folder / f"{c}.json").read_text()) for c in CAPABILITIES}


# --- what machine code tells ---------------------------------------------------------------------


def resources(usage: str) -> dict[str, int]:
    """The counts in a line such as `REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:608`."""
    return {name: int(count) for name, count in re.findall(r"([\w\[\]]+):(\d+)", usage)}


def spills(usage: str) -> bool:
    found = resources(usage)
    return found["STACK"] > 0 or found["LOCAL"] > 0


class Access(NamedTuple):
    """One load or store instruction."""

    kind: str  # "ld" or "st"
    argument: str  # of the kernel, that the address was computed from
    bits: int  # that a thread moves at once


def accesses(ptx: str, arguments: list[str]) -> list[Access]:
    """The loads from and stores to global memory, each traced to a pointer among the arguments.

    Kernels take their pointers before all else, so the n-th parameter is the n-th argument.
    """
    instructions = [
        (match[1], match[2])
        for match in re.finditer(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", ptx, re.MULTILINE)
    ]
    # Which parameters each 64-bit register was computed from; a loop may bring more of them.
    origins: dict[str, set[int]] = defaultdict(set)
    before = -1
    while before != (now := sum(map(len, origins.values()))):
        before = now
        for operation, operands in instructions:
            registers = re.findall(r"%rd\d+", operands)
            parameter = re.search(r"_param_(\d+)\]", operands)
            if re.match(r"ld\.param\.[bu]64", operation) and parameter:
                origins[registers[0]].add(int(parameter[1]))
            elif not operation.startswith(("ld.", "st.")) and operands.startswith("%rd"):
                for source in registers[1:]:
                    origins[registers[0]] |= origins[source]
    found = []
    for operation, operands in instructions:
        shape = re.match(r"(ld|st)\.global\b(?:.*\.v(\d))?.*\.[a-z]+(\d+)$", operation)
        if shape is None:
            continue
        address = re.search(r"\[\s*(%rd\d+)", operands)
        assert address is not None, f"no address in: {operation} {operands}"
        (parameter_index,) = origins[address[1]]  # exactly one
        bits = int(shape[2] or 1) * int(shape[3])
        found.append(Access(shape[1], arguments[parameter_index], bits))
    return found


def vector_bits(length: int, itemsize: int) -> int:
    """The widest vector, of at most 16 bytes, at whose multiples rows of a length all begin."""
    return 8 * itemsize * math.gcd(length, 16 // itemsize)


def describe(report: Report) -> str:
    names = ("kernel", "what", "layout", "dtype", "rows", "usage")
    return ", ".join(str(report[name]) for name in names)


def of_kernels(reports: list[Report], *kernels: str) -> list[Report]:
    chosen = [r for r in reports if r["kernel"] in kernels and r["what"] != CONTROL]
    assert {r["kernel"] for r in chosen} == set(kernels)
    return chosen


def test_a_spill_is_noticed() -> None:
    assert not spills("REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:608 TEXTURE:0")
    assert spills("REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:608 TEXTURE:0")
    assert spills("REG:40 STACK:0 SHARED:0 LOCAL:16 CONSTANT[0]:608 TEXTURE:0")


def test_accesses_are_traced_to_arguments() -> None:
    ptx = """
    .visible .entry kernel(
        .param .u64 .ptr .global .align 1 kernel_param_0,
    ld.param.b64 	%rd1, [kernel_param_0];
    ld.param.u64 	%rd2, [kernel_param_1];
    mul.wide.u32 	%rd3, %r1, 4;
    add.s64 	%rd4, %rd1, %rd3;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
    ld.global.L1::evict_last.b64 { %rd5 }, [ %rd2 + 8 ];
    $L1:
    add.s64 	%rd7, %rd6, 4;
    mov.b64 	%rd6, %rd7;
    mov.b64 	%rd6, %rd2;
    ld.param.s32 	%rd8, [kernel_param_2];
    add.s64 	%rd7, %rd7, %rd8;
    @!%p2 st.global.v2.b16 [ %rd7 + -4 ], { %rs1, %rs2 };
    st.shared.b32 [ %r1 + 0 ], { %r2 };
    """
    assert accesses(ptx, ["logits", "gradient"]) == [
        Access("ld", "logits", 128),
        Access("ld", "gradient", 64),
        Access("st", "gradient", 32),
    ]


# --- the kernels ---------------------------------------------------------------------------------


@every_capability
def test_every_kernel_was_compiled(reports: dict[int, list[Report]], capability: int) -> None:
    from balanced_group_softmax.ops import triton_kernels

    compiled = {report["kernel"] for report in reports[capability]}
    assert compiled == set(triton_kernels.__all__)
    for report in reports[capability]:
        assert f".target sm_{capability}" in report["ptx"]


@every_capability
def test_no_kernel_spills(reports: dict[int, list[Report]], capability: int) -> None:
    spilling = {r["what"]: describe(r) for r in reports[capability] if spills(r["usage"])}
    # Held to a third of its registers one has to: were it not seen here, others would not be.
    assert spilling.pop(CONTROL)
    assert not spilling


@every_capability
def test_logits_are_read_in_whole_vectors(
    reports: dict[int, list[Report]], capability: int
) -> None:
    """As wide as the alignment of the rows allows, but for the two columns of group 0.

    1236 logits allow 16 bytes of float32 and 8 of bfloat16; 13210 logits allow 8 and 4; the rows
    of 1209 logits start anywhere, so each logit is read alone.
    """
    widths = {}
    for report in of_kernels(reports[capability], "loss_kernel", "scores_kernel", "scale_kernel"):
        matrix = "gradient" if report["kernel"] == "scale_kernel" else "logits"
        found = accesses(report["ptx"], report["arguments"])
        loads = [a for a in found if a.kind == "ld" and a.argument == matrix]
        expected = vector_bits(report["num_logits"], report["itemsize"])
        assert max(access.bits for access in loads) == expected, describe(report)
        narrow = [access for access in loads if access.bits < expected]
        if report["kernel"] == "scores_kernel":
            # Each label's logit is fetched a second time, from wherever it is; two more are of
            # group 0, and a group of 182 has less than a vector for each of 128 threads.
            columns = [access for access in found if access.argument == "label_columns"]
            labels = sum(access.bits for access in columns) // 32
            assert len(narrow) <= labels + 3, describe(report)
        else:
            assert len(narrow) <= 1, describe(report)
        widths[report["layout"], report["dtype"]] = expected
    assert widths["lvis-v0.5", "float32"] == 128
    assert widths["lvis-v0.5", "bfloat16"] == widths["lvis-v0.5", "float16"] == 64
    assert widths["13204", "float32"] == 64
    assert widths["13204", "bfloat16"] == 32
    assert widths["lvis-v1", "float32"] == 32
    assert widths["lvis-v1", "bfloat16"] == 16


@every_capability
def test_gradients_are_written_in_whole_vectors(
    reports: dict[int, list[Report]], capability: int
) -> None:
    """Whatever was read so is written so; beside that only the edges of groups, logit by logit."""
    for report in of_kernels(reports[capability], "loss_kernel", "scale_kernel"):
        if report["what"] == "loss alone":
            continue
        matrix = "gradient" if report["kernel"] == "scale_kernel" else "logits"
        width = vector_bits(report["num_logits"], report["itemsize"])
        found = accesses(report["ptx"], report["arguments"])
        reads = found.count(Access("ld", matrix, width))
        writes = found.count(Access("st", "gradient", width))
        assert writes >= reads > 0, describe(report)


@every_capability
def test_scores_are_written_in_whole_vectors(
    reports: dict[int, list[Report]], capability: int
) -> None:
    """1204 and 13204 labels allow 16 bytes, 1230 allow 8; 1231, 1203 and 13205 are odd."""
    widths = set()
    for report in of_kernels(reports[capability], "scores_kernel", "joint_scores_kernel"):
        found = accesses(report["ptx"], report["arguments"])
        stores = {access.bits for access in found if access.kind == "st"}
        assert stores == {vector_bits(report["num_labels"], itemsize=4)}, describe(report)
        widths |= stores
    assert widths == {32, 64, 128}


@every_capability
def test_no_kernel_adds_in_an_order_that_may_change(
    reports: dict[int, list[Report]], capability: int
) -> None:
    """No atomics but those by which a histogram counts in shared memory."""
    for report in reports[capability]:
        atomics = re.findall(
            r"^\s*(?:@!?%p\d+\s+)?((?:atom|red)\.\S+)", report["ptx"], re.MULTILINE
        )
        allowed = re.compile(r"(atom|red)(\.relaxed)?(\.\w+)?\.shared(::\w+)?\.add\.u32")
        assert all(allowed.fullmatch(name) for name in atomics), (
            f"{describe(report)}: {set(atomics)}"
        )
