"""What importing the package loads, and which of its modules may import which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "balanced_group_softmax"
NAME = PACKAGE.name
HEAVY = [
    "cv2",
    "detectron2",
    "lvis",
    "matplotlib",
    "mmcv",
    "mmdet",
    "mmengine",
    "PIL",
    "pycocotools",
    "scipy",
    "torchvision",
    "tqdm",
    "triton",
]

# --- a fresh interpreter -------------------------------------------------------------------------

LOADED = f"""
import sys
print(*sorted({{m.split(".")[0] for m in sys.modules}} & set({HEAVY})))
"""

# What torch alone loads for the same kind of work is not ours.
PLAIN_TORCH = """
import torch
layer = torch.nn.Linear(4, 9)
loss = torch.nn.functional.cross_entropy(layer(torch.randn(6, 4)), torch.arange(6))
loss.backward()
"""

CORE = """
import torch
import balanced_group_softmax as bgs
counts = bgs.category_counts([5, 50, 500, 5000, 0])
layout = bgs.GroupLayout.from_json(bgs.GroupLayout.from_counts(counts).to_json())
head = bgs.BAGSHead(4, layout)
logits, labels = head(torch.randn(6, 4)), torch.tensor([0, 0, 0, 1, 3, 4])
head.loss(logits, labels, generator=torch.Generator().manual_seed(0)).backward()
head.load_state_dict(head.state_dict())
bgs.BAGSLoss(layout)(logits.detach(), labels)
bgs.sample_others(labels, layout)
scores = head.scores(logits.detach())
from balanced_group_softmax.rebalance.repeat_factors import RepeatFactorSampler
list(RepeatFactorSampler([1.0, 2.5]))
from balanced_group_softmax.rebalance import (
    class_weights, eql_v2, federated, focal, logit_adjustment, nearest_class_mean, seesaw, softmax,
    tail_subset, tau_norm, tau_norm_select,
)
weights = class_weights.inverse_frequency_weights(counts)
for method, settings in (
    (softmax.SoftmaxClassifier, dict(class_weights=weights)),
    (focal.FocalClassifier, {}),
    (logit_adjustment.LogitAdjustedClassifier, dict(counts=counts)),
    (seesaw.SeesawClassifier, {}),
    (eql_v2.EQLv2Classifier, {}),
    (federated.FederatedClassifier, dict(counts=counts)),
):
    other = method(4, 5, **settings)
    other.loss(other(torch.randn(6, 4)), labels).backward()
"""


def run(script: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_and_using_the_core_loads_nothing_heavy() -> None:
    assert set(run(CORE + LOADED)) <= set(run(PLAIN_TORCH + LOADED))


def test_a_heavy_import_would_be_noticed() -> None:
    assert "PIL" in run("import PIL.Image" + LOADED)


def test_the_core_works_where_nothing_else_is_installed() -> None:
    # Modules that torch itself loads stay; everything else heavy looks as if it were not there.
    script = f"""
import sys
import torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{CORE}
boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [9, 9, 12, 12], [0, 0, 1, 1], [2, 2, 3, 3],
                      [5, 5, 7, 7]])
found = bgs.select_detections(
    boxes, scores[:, layout.foreground], score_threshold=0.0, nms_threshold=0.5, max_detections=7
)
print(len(found.boxes))
"""
    assert run(script) == ["7"]


# --- layers --------------------------------------------------------------------------------------

CORE_MODULES = {"_version", "counts", "detections", "functional", "head", "layout", "sampling"}
HELPERS = {"_arguments", "_files", "layout", "tables", "counts", "detections"}

# What each module may import of ours. A module that is not named falls under its folder.
ALLOWED: dict[str, set[str]] = {
    "": CORE_MODULES,
    "_version": set(),
    # They know tensors and plain integers, no layout.
    "tables": set(),
    "ops.reference": {"tables"},
    "ops.autograd": {"tables"},
    "ops.torch_ops": {"tables", "ops.reference"},
    "ops.cpu_ops": {"tables", "ops.reference", "ops.autograd", "ops.torch_ops"},
    "ops.triton_kernels": {"ops.triton_kernels"},
    "ops.triton_ops": {"tables", "ops.autograd", "ops.torch_ops", "ops.triton_kernels"},
    # They choose one.
    "ops.eager": {"ops.reference", "ops.torch_ops", "ops.cpu_ops"},
    "ops.library": {"tables", "ops.eager", "ops.reference", "ops.torch_ops"},
    "ops.dispatch": {"ops.eager", "ops.library", "ops.reference", "ops.torch_ops"},
    "ops": set(),
    "_arguments": set(),
    "_files": set(),
    "layout_json": set(),
    "layout": {"_arguments", "_files", "layout_json", "tables"},
    "sampling": {"_arguments", "layout", "tables", "ops.dispatch"},
    "functional": {"_arguments", "layout", "tables", "ops.dispatch", "sampling"},
    "head": {"_arguments", "layout", "tables", "ops.dispatch", "sampling", "functional"},
    # They stand beside the head.
    "counts": set(),
    "detections": {"_arguments"},
    "rebalance": HELPERS | {"rebalance"},
    "rebalance.repeat_factors": {"_arguments"},
    "legacy": HELPERS | {"legacy", "rebalance.class_weights"},
    # Each adapter uses the core and what adapters share, never another adapter.
    "adapters": CORE_MODULES | {"_arguments", "tables", "adapters.protocol", "adapters.freezing"},
    "adapters.mmdet": CORE_MODULES
    | {"_arguments", "adapters.freezing", "adapters.mmdet", "rebalance"},
    "adapters.detectron2": {
        "adapters.freezing",
        *("adapters.detectron2_detections", "adapters.detectron2_layouts"),
        "adapters.detectron2_predictors",
    },
    "adapters.detectron2_detections": {"detections"},
    "adapters.detectron2_layouts": {"_arguments", "counts", "layout"},
    "adapters.detectron2_predictors": {
        *("head", "layout"),
        *("adapters.protocol", "adapters.detectron2_detections", "adapters.detectron2_layouts"),
    },
    "adapters.protocol": set(),
    "adapters.freezing": set(),
    "discriminant": {"_arguments", "head", "layout", "sampling"},
    "cli": CORE_MODULES
    | {"_arguments", "tables", "rebalance", "legacy"}
    | {"_files", "cli_figures", "cli_groups", "cli_inspect", "cli_program", "cli_texts"},
    "__main__": {"cli"},
    # How any program ends, and what its help and tables look like.
    "cli_program": set(),
    # What the commands say and draw.
    "cli_texts": set(),
    "cli_figures": {"_files", "cli_program"},
    "cli_groups": {"cli_program", "counts", "layout"},
    "cli_inspect": {"cli_program", "layout", "layout_json"},
}

# What may be imported from elsewhere, beside torch, numpy and the standard library.
FRAMEWORKS = {
    "adapters.torchvision": {"torchvision"},
    "adapters.mmdet": {"mmdet", "mmengine", "mmcv"},
    "adapters.torchvision_legacy": {"torchvision"},
    "adapters.detectron2": {"detectron2", "fvcore"},
    "adapters.detectron2_detections": {"detectron2"},
    "adapters.detectron2_layouts": {"detectron2"},
    "adapters.detectron2_predictors": {"detectron2", "fvcore"},
    "ops.triton_kernels": {"triton"},
    "ops.triton_ops": {"triton"},
}
INSIDE_CALLS = {"detections": {"torchvision"}, "cli_figures": {"matplotlib"}}


def module_of(path: Path) -> str:
    """`balanced_group_softmax/ops/dispatch.py` -> `ops.dispatch`; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


Import = tuple[str, int, bool]


def imports(source: str, module: str, modules: set[str], is_package: bool) -> Iterator[Import]:
    """Yield full name, line, and whether it runs on import, for each import in a module."""
    base = [NAME, *(module.split(".") if module else [])]

    def visit(node: ast.AST, on_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            on_import = False
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            on_import = False
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, on_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = base[: len(base) - node.level + is_package]
                origin = ".".join([*parents, *([origin] if origin else [])])
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                known = full.removeprefix(f"{NAME}.") in modules
                yield (full if known else origin), node.lineno, on_import
        for child in ast.iter_child_nodes(node):
            yield from visit(child, on_import)

    return visit(ast.parse(source), True)


def violations(sources: dict[str, str], packages: set[str]) -> list[str]:
    """Return what breaks the rules, for the source text of each module."""
    found = []
    for module, source in sources.items():
        rule = module
        while rule not in ALLOWED and rule:
            rule = rule.rpartition(".")[0]
        if rule == "" and module:
            found.append(f"{module}: no rule says what it may import")
            continue
        ours = ALLOWED[rule]
        foreign = {"torch", "numpy"} | FRAMEWORKS.get(module, FRAMEWORKS.get(rule, set()))
        for imported, line, on_import in imports(source, module, set(sources), module in packages):
            top = imported.split(".")[0]
            target = imported.removeprefix(NAME).removeprefix(".")
            if top == NAME:
                allowed = any(f"{target}.".startswith(f"{name}.") for name in ours | {module})
            elif on_import:
                allowed = top in sys.stdlib_module_names or top in foreign
            else:
                inside = foreign | INSIDE_CALLS.get(module, set())
                allowed = top in sys.stdlib_module_names or top in inside
            if not allowed:
                found.append(f"{module or NAME}:{line} imports {imported}")
    return found


def test_every_module_keeps_to_its_layer() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    sources = {module_of(path): path.read_text(encoding="utf-8") for path in paths}
    packages = {module_of(path) for path in paths if path.name == "__init__.py"}
    assert {"", "layout", "ops.dispatch", "adapters.protocol"} <= set(sources)
    assert "rebalance.repeat_factors" in sources
    assert violations(sources, packages) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layout", "from balanced_group_softmax import head"),
        ("layout", "from . import functional"),
        ("ops.reference", "from balanced_group_softmax.layout import GroupLayout"),
        ("ops.reference", "from ..layout import GroupLayout"),
        ("ops.torch_ops", "def f():\n    import balanced_group_softmax.layout"),
        ("counts", "import balanced_group_softmax.head as h"),
        ("counts", "from balanced_group_softmax import BAGSHead"),
        ("rebalance.focal", "from balanced_group_softmax.head import BAGSHead"),
        ("rebalance.repeat_factors", "from balanced_group_softmax.layout import GroupLayout"),
        ("rebalance.repeat_factors", "def f():\n    import torchvision"),
        ("functional", "from balanced_group_softmax.ops.torch_ops import loss"),
        ("functional", "from balanced_group_softmax.ops import torch_ops"),
        ("adapters.mmdet", "from balanced_group_softmax.adapters.torchvision import x"),
        ("adapters.mmdet", "from . import torchvision"),
        ("adapters.protocol", "from balanced_group_softmax.head import BAGSHead"),
        ("adapters.mmdet", "import detectron2"),
        ("head", "import torchvision"),
        ("head", "def f():\n    from torchvision.ops import nms"),
        ("detections", "from torchvision.ops import nms"),
        ("detections", "class A:\n    import torchvision"),
        ("cli_figures", "from matplotlib.figure import Figure"),
        ("ops.dispatch", "try:\n    import triton\nexcept ImportError:\n    pass"),
        ("counts", "import pandas"),
        ("novelty", "import torch"),
    ],
)
def test_breaking_a_rule_is_noticed(module: str, source: str) -> None:
    names = ["", "head", "layout", "functional", "ops", "ops.torch_ops", "ops.reference",
             "adapters", "adapters.torchvision", module]  # fmt: skip
    sources = dict.fromkeys(names, "") | {module: source}
    assert len(violations(sources, {"", "ops", "adapters"})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("detections", "def f():\n    from torchvision.ops import nms"),
        ("ops.triton_kernels.loss", "import triton.language as tl"),
        ("ops.dispatch", "from balanced_group_softmax.ops import reference, torch_ops"),
        ("adapters.torchvision", "from torchvision.ops import nms\nfrom .protocol import C"),
        ("adapters.mmdet", "from balanced_group_softmax.head import BAGSHead\nimport mmdet.models"),
        ("head", "from __future__ import annotations\nimport json, os.path\nfrom torch import nn"),
        ("", "from balanced_group_softmax.head import BAGSHead"),
        ("", "from .head import BAGSHead"),
    ],
)
def test_keeping_the_rules_is_no_violation(module: str, source: str) -> None:
    names = ["", "head", "ops.torch_ops", "ops.reference", "adapters.protocol"]
    sources = dict.fromkeys(names, "") | {module: source}
    assert violations(sources, {"", "ops", "adapters"}) == []
