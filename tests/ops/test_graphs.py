"""Graphs that are compiled or exported: one piece, and the values of eager calls."""

import math
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from library_cases import IGNORE, LAYOUT, LAYOUTS, ROWS, every_device, labels_for, logits_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from balanced_group_softmax import (
    BAGSHead,
    GroupLayout,
    grouped_softmax_loss,
    grouped_softmax_scores,
    sample_others,
)
from balanced_group_softmax.ops import dispatch, eager, library, torch_ops

FEATURES = 6
has_compiler = (
    shutil.which("g++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()
)
inductor = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        not has_compiler, reason="inductor needs a C++ compiler and Python's headers"
    ),
)


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Compiled graphs ----------------------------------------------------------------------------


def head_for(layout: GroupLayout, device: str = "cpu", **options: Any) -> BAGSHead:
    head = BAGSHead(FEATURES, layout, device=device, **options)
    nn.init.normal_(head.fc.weight)
    return head


def weighted(layout: GroupLayout) -> Callable[..., Tensor]:
    """The functional loss with weights of rows and categories."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        weights = torch.linspace(0, 2, len(labels) * layout.num_groups, device=logits.device)
        return grouped_softmax_loss(
            logits,
            labels,
            layout,
            weights=weights.view(len(labels), layout.num_groups),
            category_weights=torch.linspace(0, 3, layout.num_categories, device=logits.device),
        )

    return loss


def total(values: Tensor | dict[str, Tensor]) -> Tensor:
    """A number from each of the kinds of losses."""
    parts = list(values.values()) if isinstance(values, dict) else [values]
    return torch.stack([(index + 1) * part.sum() for index, part in enumerate(parts)]).sum()


@every_device
@pytest.mark.parametrize("kind", ["first", "last", "none"])
@pytest.mark.parametrize("method", ["loss", "losses", "group_losses", "weighted"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_losses_are_those_of_eager_calls(
    backend: str, method: str, kind: str, device: str
) -> None:
    """From the same random state, which these backends draw from as eager calls do."""
    layout = LAYOUTS[kind]
    head = head_for(layout, device, others_ratio=1.0)
    features = torch.randn(ROWS, FEATURES, device=device)
    labels = labels_for(layout, ROWS, device)
    loss = weighted(layout) if method == "weighted" else getattr(head, method)

    def step(features: Tensor, labels: Tensor) -> Tensor:
        return total(loss(head(features), labels))

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        torch.manual_seed(5)
        for _ in range(2):
            value = function(features, labels)
        results.append((value.detach(), *torch.autograd.grad(value, head.parameters())))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert results[0][1].any()


@pytest.mark.parametrize("backend", [inductor])
def test_compiled_by_inductor(backend: str) -> None:
    """Which draws from PyTorch's own random state only if told so."""
    head = head_for(LAYOUT, others_ratio=1.0)
    features, labels = torch.randn(ROWS, FEATURES), labels_for(LAYOUT)

    def step(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(features)
        return head.group_losses(logits, labels), head.scores(logits)

    compiled = torch.compile(
        step, fullgraph=True, backend=backend, options={"fallback_random": True}
    )
    results = []
    for function in (step, compiled):
        torch.manual_seed(5)
        losses, scores = function(features, labels)
        slopes = torch.autograd.grad(losses @ torch.arange(5.0), head.parameters())
        results.append((losses.detach(), scores.detach(), *slopes))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("triton_instead")
@pytest.mark.parametrize("kind", ["first", "none"])
def test_compiled_with_triton_behind_the_operators(kind: str) -> None:
    layout = LAYOUTS[kind]
    head = head_for(layout, others_ratio=1.0)
    features, labels = torch.randn(7, FEATURES), labels_for(layout, 7)

    def step(features: Tensor, labels: Tensor) -> Tensor:
        return total(head.losses(head(features), labels))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    value = compiled(features, labels)
    slopes = torch.autograd.grad(value, head.parameters())
    head.impl = "reference"
    torch.manual_seed(5)
    expected = step(features, labels)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        slopes, torch.autograd.grad(expected, head.parameters()), rtol=1e-5, atol=1e-6
    )


class Recorder:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    @property
    def operators(self) -> set[str]:
        """Those of this package, in all graphs."""
        called = [str(node.target) for graph in self.graphs for node in graph.graph.nodes]
        marked = [name for name in called if "balanced_group_softmax" in name]
        return {name.split(".")[1] for name in marked}


@every_device
@pytest.mark.parametrize("dynamic", [None, True])
def test_any_number_of_rows_without_compiling_for_each(dynamic: bool | None, device: str) -> None:
    """Once for the first number, once more at the second; 0 and 1 are numbers of their own."""
    head, recorder = head_for(LAYOUT, device), Recorder()
    losses = torch.compile(head.losses, fullgraph=True, backend=recorder, dynamic=dynamic)
    for rows in (9, 5, 21, 2, 200, 13):
        logits = logits_for(LAYOUT, rows, device).requires_grad_()
        values = losses(logits, labels_for(LAYOUT, rows, device))
        assert all(value.isfinite() for value in values.values())
        (slope,) = torch.autograd.grad(total(values), logits)
        assert slope.shape == logits.shape
    assert len(recorder.graphs) == (1 if dynamic else 2)
    assert recorder.operators == {"sample_others", "group_losses"}


def test_scores_are_plain_pytorch_in_a_graph_for_the_cpu() -> None:
    recorder = Recorder()
    scores = torch.compile(head_for(LAYOUT).scores, fullgraph=True, backend=recorder)
    logits = logits_for(LAYOUT)
    torch.testing.assert_close(scores(logits), grouped_softmax_scores(logits, LAYOUT))
    assert len(recorder.graphs) == 1
    assert not recorder.operators


@every_device
@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_every_call_draws_anew(backend: str, device: str) -> None:
    """Exactly as many as the method wants, and other rows than in the call before."""
    labels = torch.zeros(64, dtype=torch.int64, device=device)
    labels[5] = 1  # of the lowest group
    LAYOUT.tables(device)

    @torch.compile(fullgraph=True, backend=backend)
    def sample(labels: Tensor) -> Tensor:
        return sample_others(labels, LAYOUT)

    drawn = [sample(labels)[:, 1] for _ in range(4)]
    assert all(int(rows.sum()) == 9 and rows[5] for rows in drawn)
    assert len({tuple(rows.nonzero().flatten().tolist()) for rows in drawn}) == 4


@every_device
@pytest.mark.parametrize("kind", ["first", "last", "none"])
@pytest.mark.parametrize("method", ["loss", "losses", "weighted"])
def test_a_bad_label_gives_nan_in_a_compiled_call(method: str, kind: str, device: str) -> None:
    """Where it cannot be refused; and the rows of good labels keep their gradient."""
    layout = LAYOUTS[kind]
    head = head_for(layout, device, others_ratio=math.inf)  # no chance in it
    loss = weighted(layout) if method == "weighted" else getattr(head, method)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits = logits_for(layout, ROWS, device).requires_grad_()
    labels = labels_for(layout, ROWS, device)
    labels[5] = IGNORE
    (expected,) = torch.autograd.grad(total(compiled(logits, labels)), logits)
    for bad in (-1, layout.num_labels, 2**40, -(2**40)):
        labels = labels.clone()
        labels[5] = bad
        values = compiled(logits, labels)
        parts = list(values.values()) if isinstance(values, dict) else [values]
        assert all(part.isnan() for part in parts), bad
        (slope,) = torch.autograd.grad(total(values), logits)
        torch.testing.assert_close(slope, expected)


# Exported graphs ----------------------------------------------------------------------------


class Scores(nn.Module):
    def __init__(self, head: BAGSHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head.scores(self.head(features))


@pytest.mark.parametrize("kind", ["first", "last", "none"])
@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_scores_are_plain_pytorch(
    kind: str, impl: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So whatever knows PyTorch's own operators can run or translate them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else "triton" is refused without a GPU
    model = Scores(head_for(LAYOUTS[kind], impl=impl))
    program = torch.export.export(
        model,
        (torch.randn(ROWS, FEATURES),),
        dynamic_shapes={"features": {0: torch.export.Dim("rows")}},
        strict=strict,
    )
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    foreign = [
        target
        for target in called
        if isinstance(target, torch._ops.OpOverload) and target.namespace != "aten"
    ]
    assert called
    assert not foreign
    features = torch.randn(4, FEATURES)
    torch.testing.assert_close(program.module()(features), model(features), rtol=1e-5, atol=1e-6)


# Where the kernels would be taken -----------------------------------------------------------


def test_scores_with_a_gradient_are_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator has no gradient, and a graph that returns them asks for one."""
    monkeypatch.setattr(dispatch, "choose_for_scores", lambda impl, device: library)
    labels = labels_for(LAYOUT)

    def step(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = grouped_softmax_loss(logits, labels, LAYOUT, others_ratio=math.inf)
        return loss, grouped_softmax_scores(logits, LAYOUT)

    logits = logits_for(LAYOUT).requires_grad_()
    loss, scores = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    (ours,) = torch.autograd.grad(loss + scores.square().sum(), logits)
    loss, scores = step(logits)
    (expected,) = torch.autograd.grad(loss + scores.square().sum(), logits)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
@pytest.mark.parametrize("of", ["rows", "categories"])
def test_a_weight_that_is_not_positive_counts_nowhere(of: str, bad: float) -> None:
    """Nobody looks at its value in a graph."""
    logits, labels = logits_for(LAYOUT), labels_for(LAYOUT)
    weights = {
        "rows": torch.rand(ROWS, LAYOUT.num_groups) + 0.5,
        "categories": torch.rand(LAYOUT.num_categories) + 0.5,
    }
    weights[of][1] = bad

    def loss(rows: Tensor, categories: Tensor) -> Tensor:
        return grouped_softmax_loss(
            logits, labels, LAYOUT, weights=rows, category_weights=categories, reduction="groups"
        )

    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(*weights.values())
    weights[of][1] = 0
    torch.testing.assert_close(ours, loss(*weights.values()))


@pytest.fixture
def poor_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU that is too old for Triton, on a machine without a compiler."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    def fail(self: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(type(driver), "active", property(fail))
    caches = (eager._triton_serves, eager._why_no_driver)
    for cached in caches:
        cached.cache_clear()
    yield torch.device("cuda", 0)
    for cached in caches:
        cached.cache_clear()


@pytest.mark.filterwarnings("error")
def test_a_graph_does_not_hold_how_an_implementation_is_chosen(poor_gpu: torch.device) -> None:
    """Not on a GPU either, which is asked what it can."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(values: Tensor) -> Tensor:
        return values + (2 if eager.triton_serves(poor_gpu) else 1)

    assert torch.compile(step, fullgraph=True, backend=backend)(torch.zeros(2)).tolist() == [1, 1]
    assert [node.op for node in graphs[0].graph.nodes] == ["placeholder", "call_function", "output"]


def test_every_reason_against_a_gpu_is_told(poor_gpu: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"capability 6\.0.*Failed to find C compiler"):
        eager.require_triton(poor_gpu)


@pytest.mark.parametrize("kind", ["first", "none"])
def test_static_scores_copy_nothing_to_the_device(kind: str) -> None:
    """Which would wait for it: every tensor they make is made on it."""
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            devices.update(t.device.type for t in tree_leaves((args, result)) if is_tensor(t))
            return result

    layout, is_tensor = LAYOUTS[kind], torch.is_tensor
    with FakeTensorMode():  # a GPU without memory
        logits = torch.empty(ROWS, layout.num_logits, device="cuda")
        tables = layout.tables(torch.device("cpu"))
        tables = tables._replace(
            **{
                name: torch.empty(value.shape, dtype=value.dtype, device="cuda")
                for name, value in tables._asdict().items()
                if is_tensor(value)
            }
        )
        with Watch():
            torch_ops.group_scores(logits, tables)
    assert devices == {"cuda"}
