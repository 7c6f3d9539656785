"""What only a GPU can show: nothing waits for it, graphs of it draw afresh, memory, streams.

That the numbers are right is for the other tests of the kernels, which run here too. That no kernel
adds floats by atomics is seen in their machine code, in test_triton_compiled.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from balanced_group_softmax import (
    BAGSHead,
    GroupLayout,
    grouped_softmax_loss,
    grouped_softmax_scores,
    sample_others,
)
from balanced_group_softmax.ops import cpu_ops, eager


def why_not() -> list[str]:
    if not torch.cuda.is_available():
        return ["there is no CUDA or ROCm device"]
    return eager.why_not_triton(torch.device("cuda"))


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(why_not()), reason="; ".join(why_not())),
]


def layout_of(*sizes: int, background: Any = "first") -> GroupLayout:
    """Groups of so many categories, by instance counts that come in no order."""
    counts = np.repeat([5, 50, 500, 5000], sizes)
    counts = np.random.default_rng(0).permutation(counts)
    return GroupLayout.from_counts(counts.tolist(), background=background)


LAYOUT = layout_of(294, 453, 302, 181)  # LVIS v0.5: 1236 logits
WITHOUT_BACKGROUND = layout_of(200, 412, 334, 257, background=None)  # LVIS v1: 1207
both_layouts = pytest.mark.parametrize(
    "layout", [LAYOUT, WITHOUT_BACKGROUND], ids=["background", "none"]
)
both_impls = pytest.mark.parametrize("impl", ["triton", "torch"])


def on_gpu(seed: int, device: str = "cuda") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def inputs(
    rows: int,
    layout: GroupLayout = LAYOUT,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits that want a gradient, and labels, of which a quarter is foreground."""
    generator = on_gpu(seed, device)
    logits = torch.randn(rows, layout.num_logits, device=device, generator=generator)
    labels = torch.randint(layout.num_labels, (rows,), device=device, generator=generator)
    if layout.background_label is not None:
        chance = torch.rand(rows, device=device, generator=generator)
        labels = torch.where(chance < 0.25, labels, layout.background_label)
    return (2 * logits).to(dtype).requires_grad_(), labels


def loss_and_gradient(
    logits: Tensor, labels: Tensor, layout: GroupLayout = LAYOUT, **options: Any
) -> tuple[Tensor, Tensor]:
    loss = grouped_softmax_loss(logits, labels, layout, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    error = (ours.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    assert float(error.max()) <= tolerance


def assert_gradient_close(ours: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Measured by the largest entry: all of a gradient may lie far below 1."""
    error = (ours.double() - expected.double()).abs().max()
    assert float(error) <= tolerance * float(expected.abs().max())


# --- waiting for the device ----------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error for whatever waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed() -> None:
    with pytest.raises(RuntimeError), no_waiting():
        torch.ones(1, device="cuda").item()


@both_layouts
@both_impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_waits_for_the_device(layout: GroupLayout, impl: str, dtype: torch.dtype) -> None:
    logits, labels = inputs(1000, layout, dtype)
    weights = torch.rand(1000, layout.num_groups, device="cuda")
    category_weights = torch.rand(layout.num_categories, device="cuda")

    def everything() -> None:
        sample_others(labels, layout, others_ratio=1.5)
        loss_and_gradient(logits, labels, layout, impl=impl)
        loss_and_gradient(logits, labels, layout, impl=impl, generator=generator)
        loss_and_gradient(logits, labels, layout, impl=impl, weights=weights)
        loss_and_gradient(
            logits,
            labels,
            layout,
            impl=impl,
            category_weights=category_weights,
            reduction="groups",
        )
        grouped_softmax_scores(logits.detach(), layout, impl=impl)

    generator = on_gpu(0)
    everything()  # makes the tables and compiles the kernels
    with no_waiting():
        everything()


def test_a_head_does_not_wait_for_the_device() -> None:
    features = torch.randn(512, 64, device="cuda")
    _, labels = inputs(512)
    head = BAGSHead(64, LAYOUT, device="cuda")

    def step() -> None:
        logits = head(features)
        sum(head.losses(logits, labels).values()).backward()
        head.scores(logits.detach())

    step()
    with no_waiting():
        step()


# --- the same again ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 37, 1000, 8192, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["drawn", "weighted"])
def test_bitwise_reproducible(rows: int, dtype: torch.dtype, weighted: bool) -> None:
    logits, labels = inputs(rows, dtype=dtype)
    options = {"weights": torch.rand(rows, LAYOUT.num_groups, device="cuda")} if weighted else {}
    first_loss, first_gradient = loss_and_gradient(logits, labels, generator=on_gpu(1), **options)
    assert first_loss.isfinite()
    for _ in range(5):
        loss, gradient = loss_and_gradient(logits, labels, generator=on_gpu(1), **options)
        assert torch.equal(loss, first_loss)
        assert torch.equal(gradient, first_gradient)


@both_layouts
def test_the_same_keys_draw_the_same_on_cpu_and_gpu(layout: GroupLayout) -> None:
    triton_ops = eager.choose("triton", torch.device("cuda"))
    groups = layout.num_groups - (layout.background is not None)
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        rows = int(torch.randint(1, 10_000, (), generator=generator))
        bound = 2 if case % 3 == 0 else 2**31 - 1  # with many ties
        keys = torch.randint(-bound, bound, (groups, rows), generator=generator, dtype=torch.int32)
        labels = torch.randint(layout.num_labels, (rows,), generator=generator)
        ratio = (0.29, 1.0, 8.0, float("inf"), 0.0)[case % 5]
        options = {"others_ratio": ratio, "ignore_index": -100}
        on_cpu, _ = cpu_ops.sample_others(labels, keys, layout.tables("cpu"), **options)
        active, normalizers = triton_ops.sample_others(
            labels.cuda(), keys.cuda(), layout.tables("cuda:0"), **options
        )
        assert torch.equal(active.cpu(), on_cpu), (case, rows, ratio)
        assert torch.equal(normalizers.cpu(), on_cpu.sum(0).clamp(min=1).float())


# --- which implementation ------------------------------------------------------------------------


def test_auto_takes_triton() -> None:
    triton_ops = eager.choose("triton", torch.device("cuda"))
    assert triton_ops.__name__.endswith("triton_ops")
    assert eager.choose("auto", torch.device("cuda")) is triton_ops
    logits, labels = inputs(512)
    auto = loss_and_gradient(logits, labels, generator=on_gpu(1))
    forced = loss_and_gradient(logits, labels, generator=on_gpu(1), impl="triton")
    assert all(map(torch.equal, auto, forced))


@both_layouts
@pytest.mark.parametrize("reduction", ["sum", "groups"])
def test_torch_agrees_with_triton(layout: GroupLayout, reduction: str) -> None:
    logits, labels = inputs(1000, layout)
    loss, gradient = loss_and_gradient(
        logits, labels, layout, generator=on_gpu(1), impl="triton", reduction=reduction
    )
    expected_loss, expected_gradient = loss_and_gradient(
        logits, labels, layout, generator=on_gpu(1), impl="torch", reduction=reduction
    )
    assert_close(loss, expected_loss)
    assert_gradient_close(gradient, expected_gradient)
    assert torch.equal(gradient == 0, expected_gradient == 0)  # the same rows were drawn
    with torch.no_grad():
        scores = grouped_softmax_scores(logits, layout, impl="triton")
        assert_close(scores, grouped_softmax_scores(logits, layout, impl="torch"))


@both_layouts
def test_float64(layout: GroupLayout) -> None:
    logits, labels = inputs(300, layout, torch.float64)
    loss, gradient = loss_and_gradient(logits, labels, layout, generator=on_gpu(1), impl="triton")
    expected_loss, expected_gradient = loss_and_gradient(
        logits, labels, layout, generator=on_gpu(1), impl="reference"
    )
    assert loss.dtype == gradient.dtype == torch.float64
    assert_close(loss, expected_loss, 1e-12)
    assert_gradient_close(gradient, expected_gradient, 1e-12)
    with torch.no_grad():
        scores = grouped_softmax_scores(logits, layout, impl="triton")
        assert_close(scores, grouped_softmax_scores(logits, layout, impl="reference"), 1e-12)


@both_impls
@pytest.mark.parametrize("bad", [-1, LAYOUT.num_labels, 2**40, -(2**40)])
def test_a_bad_label_makes_the_loss_nan_and_harms_nothing(impl: str, bad: int) -> None:
    logits, labels = inputs(100)
    labels[7] = bad
    losses, gradient = loss_and_gradient(logits, labels, impl=impl, reduction="groups")
    torch.cuda.synchronize()  # where a failed device assertion would come to light
    assert losses.isnan().all()
    assert gradient.isfinite().all()
    assert not sample_others(labels, LAYOUT)[7].any()


# --- CUDA graphs ---------------------------------------------------------------------------------


def captured(
    function: Callable[[], Any], *generators: torch.Generator
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one call, and the tensors to which its replays write their results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("explicit", [False, True], ids=["default-generator", "own-generator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_graph_draws_afresh(explicit: bool, dtype: torch.dtype) -> None:
    logits, labels = inputs(512, dtype=dtype)
    own = on_gpu(3) if explicit else None

    def step() -> tuple[Tensor, Tensor]:
        return loss_and_gradient(logits, labels, generator=own)

    def reseed() -> None:
        torch.cuda.manual_seed(11) if own is None else own.manual_seed(11)

    graph, (loss, gradient) = captured(step, *([] if own is None else [own]))
    losses, drawn = [], []
    for _ in range(5):
        graph.replay()
        losses.append(float(loss))
        drawn.append(gradient != 0)
    assert len(set(losses)) == 5
    assert not torch.equal(drawn[0], drawn[1])

    # From the same random state a replay does what an eager call does.
    reseed()
    graph.replay()
    replayed = loss.clone(), gradient.clone()
    reseed()
    assert all(map(torch.equal, replayed, step()))


def test_a_graph_takes_new_labels() -> None:
    """The draw belongs to the graph: nothing about the labels is fixed when it is captured."""
    logits, labels = inputs(512)
    graph, (loss, gradient) = captured(lambda: loss_and_gradient(logits, labels))
    other_logits, other_labels = inputs(512, seed=1)
    with torch.no_grad():
        logits.copy_(other_logits)
        labels.copy_(other_labels)
    torch.cuda.manual_seed(11)
    graph.replay()
    torch.cuda.manual_seed(11)
    expected = loss_and_gradient(other_logits, other_labels)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@both_layouts
def test_a_graph_of_scores(layout: GroupLayout) -> None:
    logits = inputs(300, layout)[0].detach()
    graph, scores = captured(lambda: grouped_softmax_scores(logits, layout))
    logits.copy_(inputs(300, layout, seed=1)[0].detach())
    graph.replay()
    assert torch.equal(scores, grouped_softmax_scores(logits, layout))


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_loss(mode: str | None) -> None:
    torch._dynamo.reset()
    features = torch.randn(512, 64, device="cuda")
    _, labels = inputs(512)

    def steps(head: BAGSHead, count: int, compiled: bool) -> list[tuple[Tensor, Tensor]]:
        def loss_of(features: Tensor, labels: Tensor) -> Tensor:
            return head.loss(head(features), labels)

        run = torch.compile(loss_of, fullgraph=True, mode=mode) if compiled else loss_of
        results = []
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            loss = run(features, labels)
            loss.backward()
            assert head.fc.weight.grad is not None
            results.append((loss.detach().clone(), head.fc.weight.grad.clone()))
            head.zero_grad()
        return results

    # More steps than it takes to warm up, to record and to replay.
    head = BAGSHead(64, LAYOUT, device="cuda")
    losses = {float(loss) for loss, _ in steps(head, 6, compiled=True)}
    assert len(losses) == 6, "not a fresh draw in each step"

    # Without chance, all others being kept, a compiled step does what an eager one does.
    head = BAGSHead(64, LAYOUT, device="cuda", others_ratio=1e9)
    ((expected_loss, expected_gradient),) = steps(head, 1, compiled=False)
    for loss, gradient in steps(head, 4, compiled=True):
        assert_close(loss, expected_loss, 1e-5)
        assert_gradient_close(gradient, expected_gradient, 1e-5)


@both_layouts
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_scores(layout: GroupLayout, mode: str | None) -> None:
    torch._dynamo.reset()
    head = BAGSHead(64, layout, device="cuda")
    run = torch.compile(lambda x: head.scores(head(x)), fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in range(4):
            features = torch.randn(300, 64, device="cuda", generator=on_gpu(seed))
            torch.compiler.cudagraph_mark_step_begin()
            assert_close(run(features).clone(), head.scores(head(features)), 1e-5)


# --- mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(dtype: torch.dtype) -> None:
    """Ends where training in float32 ends, but for rounding, with no step skipped."""
    features = torch.randn(2000, 64, device="cuda")
    _, labels = inputs(2000)
    start = BAGSHead(64, LAYOUT, device="cuda").state_dict()
    moved = {}
    for precision in (torch.float32, dtype):
        head = BAGSHead(64, LAYOUT, device="cuda")
        head.load_state_dict(start)
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
        for seed in range(5):
            with torch.autocast("cuda", precision, enabled=precision != torch.float32):
                logits = head(features)
                loss = head.loss(logits, labels, generator=on_gpu(seed))
            assert logits.dtype == precision
            assert loss.dtype == torch.float32
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**12
        moved[precision] = head.fc.weight.detach() - start["fc.weight"]
    error = (moved[dtype] - moved[torch.float32]).norm() / moved[torch.float32].norm()
    assert 0 < float(error) < 0.02


def test_small_float16_gradients_survive() -> None:
    """A loss scale multiplies a gradient before it is rounded to float16, not after."""
    scale = 2.0**14
    logits, labels = inputs(8192, dtype=torch.float16)
    loss = grouped_softmax_loss(logits, labels, LAYOUT, generator=on_gpu(1))
    (loss * scale).backward()
    wide = logits.detach().double().requires_grad_()
    _, expected = loss_and_gradient(wide, labels, generator=on_gpu(1), impl="reference")
    smallest = 2.0**-24  # of float16; less than half of it rounds to 0
    assert ((expected != 0) & (expected.abs() < smallest / 2)).float().mean() > 0.01
    assert logits.grad is not None
    error = (logits.grad.double() / scale - expected).abs()
    # Where a probability is close to 1, float32 has lost digits of its difference from 1.
    active = sample_others(labels, LAYOUT, generator=on_gpu(1))
    widths = torch.tensor(LAYOUT.group_sizes, device="cuda")
    lost = 2.0**-22 / active.sum(0).clamp(min=1).repeat_interleave(widths)
    assert (error <= expected.abs() * 2.0**-10 + smallest / scale + lost).all()


# --- memory, streams, devices --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_beside_the_logits(dtype: torch.dtype) -> None:
    """Of loss and gradient: little more than the gradient."""
    logits, labels = inputs(8192, dtype=dtype)

    def step() -> None:
        logits.grad = None
        (3 * grouped_softmax_loss(logits, labels, LAYOUT)).backward()

    step()
    logits.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    size = logits.numel() * logits.element_size()
    assert size <= peak <= 1.1 * size


def test_kernels_run_on_the_current_stream() -> None:
    logits, labels = inputs(512)
    later = inputs(512, seed=1)[0].detach()
    weights = torch.rand(512, LAYOUT.num_groups, device="cuda")
    expected = loss_and_gradient(later.clone().requires_grad_(), labels, weights=weights)
    expected_scores = grouped_softmax_scores(later, LAYOUT)
    loss_and_gradient(logits, labels, weights=weights)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles; whoever does not queue behind sees the old logits
        with torch.no_grad():
            logits.copy_(later)
        loss, gradient = loss_and_gradient(logits, labels, weights=weights)
        scores = grouped_softmax_scores(logits.detach(), LAYOUT)
    torch.cuda.synchronize()
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    assert torch.equal(scores, expected_scores)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device or none")
def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        logits, labels = inputs(512, device=device)
        assert torch.cuda.current_device() == 0
        loss, gradient = loss_and_gradient(logits, labels, generator=on_gpu(1, device))
        scores = grouped_softmax_scores(logits.detach(), LAYOUT)
        assert loss.device == gradient.device == scores.device == torch.device(device)
        results.append([loss.cpu(), gradient.cpu(), scores.cpu()])
    assert all(map(torch.equal, *results))


def test_more_elements_than_an_int32_counts() -> None:
    """The first and the last rows count; their results are those of these rows alone."""
    layout = layout_of(4000, 5000, 3000, 1204)
    rows = 2**31 // layout.num_logits + 1000
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * rows * layout.num_logits * 2:
        pytest.skip(f"needs {8 * rows * layout.num_logits / 2**30:.0f} GiB of free memory")
    chosen = torch.cat([torch.arange(50), torch.arange(rows - 50, rows)]).cuda()
    logits = torch.empty(rows, layout.num_logits, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(layout.num_labels, (rows,), device="cuda", generator=on_gpu(0))
    weights = torch.zeros(rows, layout.num_groups, dtype=torch.bool, device="cuda")
    weights[chosen] = True
    few = logits[chosen].requires_grad_()
    expected = loss_and_gradient(few, labels[chosen], layout, weights=weights[chosen])
    expected_scores = grouped_softmax_scores(few.detach(), layout)

    # Scaled by 3 in backward, so that the kernel that does so meets the offsets too.
    logits.requires_grad_()
    loss = grouped_softmax_loss(logits, labels, layout, weights=weights)
    (3 * loss).backward()
    assert logits.grad is not None
    assert_close(loss.detach(), expected[0])
    scaled = logits.grad[chosen].float() / 3
    torch.testing.assert_close(scaled, expected[1].float(), rtol=2.0**-6, atol=1e-12)
    assert not any(part.any() for part in logits.grad[50:-50].split(10_000))
    del loss
    logits.grad = None

    scores = grouped_softmax_scores(logits.detach(), layout)
    assert torch.equal(scores[chosen], expected_scores)
    assert sample_others(labels, layout)[:, 0].all()
