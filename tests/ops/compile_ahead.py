"""Compiles the Triton kernels for a GPU that need not be there, through their own launchers.

    python compile_ahead.py 90 report.json

compiles for compute capability 9.0. The report lists, for each kernel, the call it came from, its
PTX and the resources that its machine code uses. A program of its own, since the tests' process
has Triton interpret kernels, which is settled when it is imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.ops import triton_kernels, triton_ops

LAYOUTS = {  # categories with up to 9, 99, 999 instances, and more
    "lvis-v0.5": (294, 453, 302, 181),
    "lvis-v1": (200, 412, 334, 257),
    "13204": (4000, 5000, 3000, 1204),
}
FEW, SOME, MANY = 1000, 8192, 65536
"""Rows: one for each program, and no multiple of 16; then four, and thirty-two."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Device:
    """All that Triton asks its driver for before it would launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Compiler:
    """Calls launchers with tensors without memory, and keeps what they would have launched."""

    def __init__(self) -> None:
        self.compiled: list[tuple[dict[str, Any], JITFunction, Any]] = []
        self.call: dict[str, Any] = {}
        run = JITFunction.run

        def only_compile(function: JITFunction, *args: Any, **options: Any) -> Any:
            kernel = run(function, *args, **{**options, "warmup": True})
            self.compiled.append((self.call, function, kernel))
            return kernel

        JITFunction.run = only_compile

    def report(self) -> list[dict[str, Any]]:
        """What was compiled, each kernel with the first call that needed it."""
        reports = {}
        for call, function, kernel in self.compiled:
            name = next(n for n in triton_kernels.__all__ if getattr(triton_kernels, n) is function)
            report = {
                **call,
                "kernel": name,
                "arguments": list(function.arg_names),
                "ptx": kernel.asm["ptx"],
            }
            reports.setdefault(kernel.asm["cubin"], report)
        for cubin, report in reports.items():
            report["usage"] = resource_usage(cubin)
        return list(reports.values())

    def layout(self, name: str, background: str | None = "first") -> None:
        counts = [
            count
            for count, size in zip((5, 50, 500, 5000), LAYOUTS[name], strict=True)
            for _ in range(size)
        ]
        self.name = name if background else f"{name} without background"
        self.tables = GroupLayout.from_counts(counts, background=background).tables(
            torch.device("meta")
        )

    def _logits(self, what: str, dtype: torch.dtype, rows: int) -> Tensor:
        logits = empty(rows, sum(self.tables.sizes), dtype=dtype)
        self.call = {
            "what": what,
            "layout": self.name,
            "num_logits": logits.shape[1],
            "num_labels": self.tables.num_labels,
            "dtype": str(dtype).removeprefix("torch."),
            "itemsize": dtype.itemsize,
            "rows": rows,
        }
        return logits

    def sample(self, rows: int) -> None:
        self._logits("draw", torch.float32, rows)
        groups = self.tables.num_groups - self.tables.first_category_group
        triton_ops.sample_others(
            empty(rows, dtype=torch.int64),
            empty(groups, rows, dtype=torch.int32),
            self.tables,
            others_ratio=8.0,
            ignore_index=-100,
        )

    def loss(
        self,
        what: str,
        dtype: torch.dtype,
        rows: int,
        *,
        with_gradient: bool = True,
        with_losses: bool = True,
        with_factors: bool = False,
        weighted: bool = False,
        reduction: str = "sum",
    ) -> None:
        """As after a draw, or weighted: with weights of rows and of categories."""
        logits = self._logits(what, dtype, rows)
        num_groups = self.tables.num_groups
        triton_ops.losses_and_gradient(
            logits,
            empty(rows, dtype=torch.int64),
            empty(rows, num_groups) if weighted else empty(num_groups, rows, dtype=torch.bool).T,
            self.tables,
            category_weights=empty(self.tables.num_categories) if weighted else None,
            normalizers=None if weighted else empty(num_groups),
            ignore_index=-100,
            reduction=reduction,
            with_gradient=with_gradient,
            with_losses=with_losses,
            factors=empty(()).expand(num_groups) if with_factors else None,
        )

    def scale(self, dtype: torch.dtype, rows: int) -> None:
        gradient = self._logits("scaled gradient", dtype, rows)
        active = empty(self.tables.num_groups, rows, dtype=torch.bool).T
        factors = empty(()).expand(self.tables.num_groups)
        triton_ops.scale_gradient(gradient, factors, active, self.tables)

    def scores(self, dtype: torch.dtype) -> None:
        triton_ops.group_scores(self._logits("scores", dtype, FEW), self.tables)


def empty(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Without memory, as large as one likes; its address, 0, counts as aligned."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def compile_all(compiler: Compiler) -> None:
    """For every layout both dtypes and numbers of rows; each other choice at one or two of them."""
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    for name in LAYOUTS:
        compiler.layout(name)
        compiler.sample(FEW)
        compiler.loss("loss and gradient", single, FEW)
        compiler.loss("loss and gradient", brain, MANY, with_factors=name == "lvis-v1")
        compiler.scale(brain, MANY)
        compiler.scores(single)
        compiler.scores(brain)
    compiler.loss("loss and gradient", single, MANY, weighted=True, with_factors=True)
    compiler.loss("gradient of factors", brain, FEW, with_factors=True, with_losses=False)
    compiler.loss("loss alone", half, MANY, with_gradient=False, reduction="groups")
    compiler.scale(single, FEW)

    compiler.layout("lvis-v0.5")
    compiler.sample(MANY)
    compiler.loss("loss and gradient", single, MANY)
    compiler.loss("gradient of factors", brain, FEW, with_factors=True, with_losses=False)
    compiler.loss("loss and gradient", half, SOME, with_factors=True)
    compiler.scale(single, FEW)
    compiler.scores(half)

    compiler.layout("lvis-v0.5", background=None)
    compiler.sample(FEW)
    compiler.loss("loss and gradient", single, SOME, weighted=True)
    for name in LAYOUTS:
        compiler.layout(name, background=None)
        compiler.scores(single)
    compiler.scores(brain)

    # A control: with a fraction of the registers, the kernel has to spill.
    compiler.layout("lvis-v0.5")
    triton_ops.TUNING["maxnreg"] = 24
    compiler.loss("starved of registers", single, FEW)


def resource_usage(cubin: bytes) -> str:
    """The line `REG:40 STACK:0 ... LOCAL:0 ...` on the machine code of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(CUOBJDUMP), "-res-usage", str(file)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return next(line.strip() for line in result.stdout.splitlines() if "REG:" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int)
    parser.add_argument("report", type=Path)
    arguments = parser.parse_args()
    driver.set_active(Device(arguments.capability))
    compiler = Compiler()
    compile_all(compiler)
    arguments.report.write_text(json.dumps(compiler.report()))


if __name__ == "__main__":
    main()
