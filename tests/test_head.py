"""The head: what it holds, how it starts, and what it survives."""

import copy
import io
import pickle
import shutil
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from balanced_group_softmax import (
    BAGSHead,
    BAGSLoss,
    GroupLayout,
    grouped_softmax_loss,
    grouped_softmax_scores,
)

COUNTS = [3, 2500, 40, 7, 600, 12, 0, 5000]
IN_FEATURES = 16
BACKGROUNDS = ["first", "last", None]
TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


@pytest.fixture
def layout() -> GroupLayout:
    return GroupLayout.from_counts(COUNTS)


@pytest.fixture
def head(layout: GroupLayout) -> BAGSHead:
    head = BAGSHead(IN_FEATURES, layout)
    nn.init.normal_(head.fc.weight)
    nn.init.normal_(head.fc.bias)
    return head


@pytest.fixture
def features() -> Tensor:
    return torch.randn(32, IN_FEATURES)


@pytest.fixture
def labels(layout: GroupLayout) -> Tensor:
    return torch.randint(0, layout.num_labels, (32,))


class Scores(nn.Module):
    """Features to scores: what gets exported, and a model around the head."""

    def __init__(self, head: BAGSHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head.scores(self.head(features))


class TestUse:
    def test_agrees_with_the_functions(
        self, head: BAGSHead, features: Tensor, labels: Tensor
    ) -> None:
        logits = head(features)
        assert torch.equal(logits, head.fc(features))

        def draw() -> torch.Generator:
            return torch.Generator().manual_seed(3)

        groups = grouped_softmax_loss(
            logits, labels, head.layout, generator=draw(), reduction="groups"
        )
        assert torch.equal(head.group_losses(logits, labels, draw()), groups)
        assert torch.equal(head.loss(logits, labels, draw()), groups.sum())
        assert torch.equal(BAGSLoss(head.layout)(logits, labels, draw()), groups.sum())
        by_group = BAGSLoss(head.layout, reduction="groups")
        assert torch.equal(by_group(logits, labels, draw()), groups)
        assert torch.equal(head.scores(logits), grouped_softmax_scores(logits, head.layout))

    def test_losses_carry_the_names_of_the_groups(
        self, head: BAGSHead, features: Tensor, labels: Tensor
    ) -> None:
        losses = head.losses(head(features), labels)
        assert list(losses) == [
            "loss_cls_bg_fg",
            "loss_cls_0_10",
            "loss_cls_10_100",
            "loss_cls_100_1000",
            "loss_cls_1000_inf",
        ]
        assert all(loss.shape == () for loss in losses.values())

    def test_settings_reach_the_loss(self, layout: GroupLayout, features: Tensor) -> None:
        labels = torch.full((32,), 7)
        labels[0] = 2
        head = BAGSHead(IN_FEATURES, layout, others_ratio=0, ignore_index=7, impl="reference")
        losses = head.group_losses(head(features), labels)
        only_row = grouped_softmax_loss(
            head(features[:1]), labels[:1], layout, others_ratio=0, reduction="groups"
        )
        assert torch.allclose(losses, only_row)

    @pytest.mark.parametrize("make", ["head", "from_linear", "loss"])
    def test_category_weights_reach_the_loss(
        self, layout: GroupLayout, features: Tensor, labels: Tensor, make: str
    ) -> None:
        weights = torch.linspace(0.1, 5, len(COUNTS))
        settings = {"others_ratio": float("inf"), "category_weights": weights.tolist()}
        loss: Any
        if make == "head":
            head = BAGSHead(IN_FEATURES, layout, **settings)
            logits, loss = head(features), head.loss
        elif make == "from_linear":
            head = BAGSHead.from_linear(nn.Linear(IN_FEATURES, 9), layout, **settings)
            logits, loss = head(features), head.loss
        else:
            logits, loss = torch.randn(32, layout.num_logits), BAGSLoss(layout, **settings)
        expected = [
            grouped_softmax_loss(logits, labels, layout, others_ratio=torch.inf, **weighted)
            for weighted in ({"category_weights": weights}, {})
        ]
        assert torch.equal(loss(logits, labels), expected[0])
        assert not torch.allclose(*expected)

    def test_category_weights_follow_the_head(self, layout: GroupLayout) -> None:
        weights = torch.ones(len(COUNTS))
        head = BAGSHead(IN_FEATURES, layout, category_weights=weights)
        assert list(head.state_dict()) == list(BAGSHead(IN_FEATURES, layout).state_dict())
        weights.zero_()
        assert copy.deepcopy(head).double().category_weights.tolist() == [1.0] * len(COUNTS)

    def test_prints_its_settings(self, head: BAGSHead) -> None:
        assert "8 categories {0_10: 3, 10_100: 2" in repr(head)
        assert "others_ratio=8" in repr(head)
        assert "reduction='sum'" in repr(BAGSLoss(head.layout))

    def test_reset_starts_afresh(self, head: BAGSHead) -> None:
        head.reset_parameters()
        assert 0.005 < head.fc.weight.std() < 0.02
        assert not head.fc.bias.any()

    def test_learns(self, layout: GroupLayout) -> None:
        features = torch.eye(IN_FEATURES)[: layout.num_labels].repeat(20, 1)
        labels = torch.arange(layout.num_labels).repeat(20)
        head = BAGSHead(IN_FEATURES, layout)
        optimizer = torch.optim.SGD(head.parameters(), lr=10)
        for _ in range(100):
            optimizer.zero_grad()
            head.loss(head(features), labels).backward()
            optimizer.step()
        assert torch.equal(head.scores(head(features)).argmax(dim=1), labels)

    @pytest.mark.parametrize(
        ("change", "error", "said"),
        [
            ({"in_features": 0}, ValueError, "in_features"),
            ({"in_features": 2.0}, TypeError, "in_features"),
            ({"in_features": True}, TypeError, "in_features"),
            ({"layout": [1, 2]}, TypeError, "layout"),
            ({"others_ratio": -1}, ValueError, "others_ratio"),
            ({"others_ratio": float("nan")}, ValueError, "others_ratio"),
            ({"others_ratio": "8"}, TypeError, "others_ratio"),
            ({"ignore_index": None}, TypeError, "ignore_index"),
            ({"impl": "cuda"}, ValueError, "impl"),
            ({"category_weights": [1.0] * 7}, ValueError, "category_weights"),
            ({"category_weights": [1.0] * 7 + [-1]}, ValueError, "category_weights"),
            ({"category_weights": [1.0] * 7 + [float("inf")]}, ValueError, "category_weights"),
            ({"category_weights": "none"}, TypeError, "category_weights"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_bad_settings_are_refused(
        self, layout: GroupLayout, change: dict, error: type[Exception], said: str
    ) -> None:
        arguments = {"in_features": IN_FEATURES, "layout": layout, **change}
        with pytest.raises(error, match=f"`{said}`"):
            BAGSHead(arguments.pop("in_features"), arguments.pop("layout"), **arguments)

    def test_bad_reduction_is_refused(self, layout: GroupLayout) -> None:
        with pytest.raises(ValueError, match=r"`reduction`.*'mean'"):
            BAGSLoss(layout, reduction="mean")


class TestFromLinear:
    @pytest.mark.parametrize("background", BACKGROUNDS)
    def test_category_rows_are_copied_to_their_columns(self, background: str | None) -> None:
        layout = GroupLayout.from_counts(COUNTS, background=background)
        linear = nn.Linear(IN_FEATURES, layout.num_labels)
        head = BAGSHead.from_linear(linear, layout)
        columns = layout.tables().category_columns
        assert torch.equal(head.fc.weight[columns], linear.weight[layout.foreground])
        assert torch.equal(head.fc.bias[columns], linear.bias[layout.foreground])

    @pytest.mark.parametrize("background", ["first", "last"])
    def test_others_and_background_start_as_the_background_row(self, background: str) -> None:
        layout = GroupLayout.from_counts(COUNTS, background=background)
        linear = nn.Linear(IN_FEATURES, layout.num_labels)
        head = BAGSHead.from_linear(linear, layout)
        for start in layout.group_starts:
            assert torch.equal(head.fc.weight[start], linear.weight[layout.background_label])
            assert torch.equal(head.fc.bias[start], linear.bias[layout.background_label])
        # Foreground is the logsumexp of the categories where their logits are equal.
        nn.init.constant_(linear.weight[layout.foreground].detach(), 0.25)
        nn.init.constant_(linear.bias[layout.foreground].detach(), -1.0)
        head = BAGSHead.from_linear(linear, layout)
        features = torch.randn(5, IN_FEATURES)
        expected = linear(features)[:, layout.foreground].logsumexp(dim=1)
        assert torch.allclose(head(features)[:, 1], expected, atol=1e-5)

    def test_without_background_the_first_scores_are_those_of_softmax(self) -> None:
        layout = GroupLayout.from_counts(COUNTS, background=None)
        linear, features = nn.Linear(IN_FEATURES, 8), torch.randn(9, IN_FEATURES)
        head = BAGSHead.from_linear(linear, layout)
        assert torch.allclose(head.scores(head(features)), linear(features).softmax(dim=1))

    def test_bias(self, layout: GroupLayout) -> None:
        without = nn.Linear(IN_FEATURES, layout.num_labels, bias=False)
        head = BAGSHead.from_linear(without, layout)
        assert not head.fc.bias[layout.tables().category_columns].any()
        dropped = BAGSHead.from_linear(nn.Linear(IN_FEATURES, 9), layout, bias=False)
        assert dropped.fc.bias is None

    def test_settings_dtype_and_independence(self, layout: GroupLayout) -> None:
        linear = nn.Linear(IN_FEATURES, layout.num_labels, dtype=torch.float64)
        head = BAGSHead.from_linear(linear, layout, others_ratio=2, ignore_index=-1, impl="torch")
        assert (head.others_ratio, head.ignore_index, head.impl) == (2, -1, "torch")
        assert head.fc.weight.dtype == torch.float64
        assert BAGSHead.from_linear(linear, layout, dtype=torch.float32).fc.bias.dtype == (
            torch.float32
        )
        before = head.fc.weight.clone()
        nn.init.zeros_(linear.weight)
        assert torch.equal(head.fc.weight, before)
        assert head.fc.weight.requires_grad
        random_state = torch.get_rng_state()
        BAGSHead.from_linear(linear, layout)
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_what_does_not_fit_is_refused(self, layout: GroupLayout) -> None:
        with pytest.raises(ValueError, match=r"9 outputs.*got 8"):
            BAGSHead.from_linear(nn.Linear(IN_FEATURES, 8), layout)
        with pytest.raises(TypeError, match=r"nn\.Linear, got Conv2d"):
            BAGSHead.from_linear(nn.Conv2d(3, 9, 1), layout)


class TestCheckpoint:
    def test_describes_itself(self, head: BAGSHead, tmp_path: Path) -> None:
        assert sorted(head.state_dict()) == ["_extra_state", "fc.bias", "fc.weight"]
        assert head.state_dict()["_extra_state"].dtype == torch.uint8
        torch.save(Scores(head).state_dict(), tmp_path / "model.pth")
        state = torch.load(tmp_path / "model.pth", weights_only=True)
        assert GroupLayout.from_state_dict(state) == head.layout
        assert GroupLayout.from_state_dict(state, prefix="head.") == head.layout
        again = Scores(BAGSHead(IN_FEATURES, GroupLayout.from_state_dict(state)))
        again.load_state_dict(state)
        assert torch.equal(again.head.fc.weight, head.fc.weight)

    def test_no_layout_or_several(self, head: BAGSHead) -> None:
        with pytest.raises(ValueError, match=r"found none anywhere among 1 entries"):
            GroupLayout.from_state_dict({"fc.weight": torch.zeros(3)})
        with pytest.raises(ValueError, match=r"under the prefix 'other\.'"):
            GroupLayout.from_state_dict(head.state_dict(), prefix="other.")
        cascade = nn.ModuleList([head, copy.deepcopy(head)])
        assert GroupLayout.from_state_dict(cascade.state_dict()) == head.layout
        cascade.append(BAGSHead(4, GroupLayout.from_counts([1, 2])))
        with pytest.raises(ValueError, match=r"'2\._extra_state'"):
            GroupLayout.from_state_dict(cascade.state_dict())

    def test_other_extra_states_are_passed_over(self, head: BAGSHead) -> None:
        state = {"amp._extra_state": torch.zeros(9), "x._extra_state": {"a": 1}}
        state["y._extra_state"] = torch.frombuffer(bytearray(b"abc"), dtype=torch.uint8)
        state.update(Scores(head).state_dict())
        assert GroupLayout.from_state_dict(state) == head.layout

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            (GroupLayout.from_counts(COUNTS, thresholds=(10, 100)), "groups"),
            (GroupLayout.from_counts(COUNTS[:-1]), "7 categories instead of 8"),
            (GroupLayout.from_counts(COUNTS[::-1]), "categories in other groups"),
            (GroupLayout.from_counts(COUNTS, background="last"), "background 'last'"),
            (GroupLayout.from_counts(COUNTS, category_ids=range(1, 9)), "first at 0: 1 instead"),
        ],
        ids=["thresholds", "categories", "membership", "background", "ids"],
    )
    def test_another_layout_is_refused_before_a_weight_is_copied(
        self, head: BAGSHead, other: GroupLayout, said: str
    ) -> None:
        mine = head
        if other.category_ids is not None:
            mine = BAGSHead(
                IN_FEATURES, GroupLayout.from_counts(COUNTS, category_ids=range(0, 16, 2))
            )
        before = copy.deepcopy(mine.state_dict())
        with pytest.raises(ValueError, match=said):
            Scores(mine).load_state_dict(Scores(BAGSHead(IN_FEATURES, other)).state_dict())
        for key, value in mine.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_unknown_ids_may_meet_known_ones(self, head: BAGSHead) -> None:
        known = GroupLayout.from_counts(COUNTS, category_ids=range(8))
        BAGSHead(IN_FEATURES, known).load_state_dict(head.state_dict())

    def test_another_width_is_refused(self, head: BAGSHead) -> None:
        before = head.fc.weight.clone()
        state = BAGSHead(IN_FEATURES + 1, head.layout).state_dict()
        with pytest.raises(ValueError, match=r"fc\.weight of shape \[14, 16\].*\[14, 17\]"):
            head.load_state_dict(state)
        del state["_extra_state"], state["fc.weight"]
        state["fc.bias"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"fc\.bias of shape"):
            head.load_state_dict(state, strict=False)
        assert torch.equal(head.fc.weight, before)

    def test_corrupt_layout_is_refused(self, head: BAGSHead) -> None:
        for corrupt in (torch.zeros(7, dtype=torch.uint8), torch.zeros(2, 2), "text"):
            with pytest.raises(ValueError, match="layout"):
                head.load_state_dict({**head.state_dict(), "_extra_state": corrupt})

    def test_layout_that_went_missing(self, head: BAGSHead) -> None:
        state = {k: v for k, v in head.state_dict().items() if k != "_extra_state"}
        with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
            head.load_state_dict(state)
        head.load_state_dict(state, strict=False)

    def test_safetensors(self, head: BAGSHead, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(head.state_dict(), tmp_path / "head.safetensors")
        state = safetensors.load_file(tmp_path / "head.safetensors")
        again = BAGSHead(IN_FEATURES, GroupLayout.from_state_dict(state))
        again.load_state_dict(state)
        assert torch.equal(again.fc.weight, head.fc.weight)
        safetensors.save_model(head, tmp_path / "model.safetensors")
        safetensors.load_model(again, tmp_path / "model.safetensors")

    def test_meta_device_and_assign(self, head: BAGSHead, features: Tensor) -> None:
        with torch.device("meta"):
            empty = BAGSHead(IN_FEATURES, head.layout)
        assert empty.fc.weight.is_meta
        empty.load_state_dict(head.state_dict(), assign=True)
        assert torch.equal(empty.scores(empty(features)), head.scores(head(features)))


class TestSurvives:
    def test_deepcopy_and_pickle(self, head: BAGSHead, features: Tensor) -> None:
        for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert twin.layout == head.layout
            assert torch.equal(twin.scores(twin(features)), head.scores(head(features)))

    def test_averaging_with_buffers(self, head: BAGSHead) -> None:
        averaged = torch.optim.swa_utils.AveragedModel(Scores(head), use_buffers=True)
        expected = head.fc.weight.detach().clone()
        averaged.update_parameters(Scores(head))
        with torch.no_grad():
            head.fc.weight.add_(1)
        averaged.update_parameters(Scores(head))
        assert torch.allclose(averaged.module.head.fc.weight, expected + 0.5)
        assert GroupLayout.from_state_dict(averaged.state_dict()) == head.layout
        averaged.load_state_dict(averaged.state_dict())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(
        self, head: BAGSHead, features: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> None:
        with torch.autocast("cpu", dtype=dtype):
            logits = head(features)
            loss, scores = head.loss(logits, labels), head.scores(logits)
        assert logits.dtype == dtype
        assert loss.dtype == scores.dtype == torch.float32
        loss.backward()
        assert head.fc.weight.grad.isfinite().all()
        assert head.fc.weight.grad.any()

    def test_default_device_elsewhere(self, head: BAGSHead) -> None:
        labels = torch.tensor([0, 1, 2])
        logits = torch.zeros(3, head.layout.num_logits, requires_grad=True)
        with torch.device("meta"):
            assert head.layout.bin_labels.device.type == "cpu"
            loss = head.loss(logits, labels)
            scores = head.scores(logits)
        loss.backward()
        assert loss.device == scores.device == logits.grad.device == torch.device("cpu")

    def test_inference_mode_then_training(
        self, layout: GroupLayout, features: Tensor, labels: Tensor
    ) -> None:
        with torch.inference_mode():
            head = BAGSHead(IN_FEATURES, GroupLayout.from_counts(COUNTS))
            head.scores(head(features))
        trained = BAGSHead(IN_FEATURES, head.layout)
        trained.loss(trained(features), labels).backward()

    def test_functional_call(self, head: BAGSHead, features: Tensor, labels: Tensor) -> None:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(head, parameters, (features,))
            return head.loss(logits, labels, torch.Generator().manual_seed(0))

        parameters = dict(head.named_parameters())
        (gradient,) = torch.autograd.grad(loss(parameters), parameters["fc.bias"])
        assert gradient.any()

        def of_weights(parameters: dict[str, Tensor], labels: Tensor) -> Tensor:
            logits = torch.func.functional_call(head, parameters, (features,))
            return grouped_softmax_loss(
                logits, labels, head.layout, others_ratio=float("inf"), impl="reference"
            )

        by_transform = torch.func.grad(of_weights)(parameters, labels)
        (expected,) = torch.autograd.grad(of_weights(parameters, labels), parameters["fc.bias"])
        assert torch.allclose(by_transform["fc.bias"], expected)

    @pytest.mark.parametrize(
        "backend",
        [
            "aot_eager",
            pytest.param(
                "inductor",
                marks=pytest.mark.skipif(
                    shutil.which("g++") is None
                    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
                    reason="inductor needs a C++ compiler and Python's headers",
                ),
            ),
        ],
    )
    def test_compile_without_graph_breaks(
        self, layout: GroupLayout, features: Tensor, labels: Tensor, backend: str
    ) -> None:
        torch._dynamo.reset()
        head = BAGSHead(IN_FEATURES, layout, others_ratio=float("inf"))  # no chance in it

        @torch.compile(fullgraph=True, backend=backend)
        def step(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(features)
            return head.group_losses(logits, labels), head.scores(logits)

        losses, scores = step(features, labels)
        losses.sum().backward()
        gradient, head.fc.weight.grad = head.fc.weight.grad, None
        logits = head(features)
        expected = head.group_losses(logits, labels)
        expected.sum().backward()
        assert torch.allclose(losses, expected)
        assert torch.allclose(scores, head.scores(logits))
        assert torch.allclose(gradient, head.fc.weight.grad, atol=1e-6)

    def test_compile_with_any_number_of_rows(
        self, head: BAGSHead, features: Tensor, labels: Tensor
    ) -> None:
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
        def losses(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return head.losses(head(features), labels)

        for rows in (32, 17, 5, 1, 0):
            assert all(loss.isfinite() for loss in losses(features[:rows], labels[:rows]).values())

    def test_compile_draws_anew_and_exactly(self, layout: GroupLayout) -> None:
        torch._dynamo.reset()
        labels = torch.zeros(64, dtype=torch.int64)
        labels[5] = 1  # of the lowest group

        @torch.compile(fullgraph=True, backend="aot_eager")
        def losses(logits: Tensor, labels: Tensor) -> Tensor:
            return grouped_softmax_loss(logits, labels, layout, reduction="groups")

        drawn = set()
        for _ in range(5):
            logits = torch.zeros(64, layout.num_logits, requires_grad=True)
            losses(logits, labels).sum().backward()
            start = layout.group_starts[1]
            rows = logits.grad[:, start].nonzero().flatten().tolist()
            assert len(rows) == 9
            assert 5 in rows
            drawn.add(tuple(rows))
        assert len(drawn) > 1

    @pytest.mark.parametrize("bad", [9, -1, 1 << 40])
    def test_compile_with_a_bad_label_gives_nan(
        self, head: BAGSHead, features: Tensor, labels: Tensor, bad: int
    ) -> None:
        torch._dynamo.reset()
        labels[3] = bad
        losses = torch.compile(head.group_losses, fullgraph=True, backend="aot_eager")
        assert losses(head(features), labels).isnan().all()

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
    def test_export_of_scores(self, head: BAGSHead, features: Tensor, strict: bool) -> None:
        program = torch.export.export(
            Scores(head),
            (features,),
            dynamic_shapes={"features": {0: torch.export.Dim("rows")}},
            strict=strict,
        )
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        exported = torch.export.load(buffer).module()
        assert torch.allclose(exported(features[:7]), head.scores(head(features[:7])))

    @pytest.mark.parametrize("background", BACKGROUNDS)
    @pytest.mark.parametrize(
        "dynamo",
        [
            pytest.param(
                True, marks=pytest.mark.skipif(TORCH < (2, 7), reason="exporter of torch 2.7 on")
            ),
            False,
        ],
        ids=["dynamo", "torchscript"],
    )
    def test_onnx_export_of_scores(
        self, features: Tensor, tmp_path: Path, dynamo: bool, background: str | None
    ) -> None:
        pytest.importorskip("onnx")
        onnxruntime = pytest.importorskip("onnxruntime")
        head = BAGSHead(IN_FEATURES, GroupLayout.from_counts(COUNTS, background=background))
        nn.init.normal_(head.fc.weight)
        path = tmp_path / "scores.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both exporters speak of their own future
            if dynamo:
                pytest.importorskip("onnxscript")
                rows = {"features": {0: torch.export.Dim("rows")}}
                torch.onnx.export(Scores(head), (features,), path, dynamo=True, dynamic_shapes=rows)
            else:
                chosen = {"dynamo": False} if TORCH >= (2, 5) else {}
                torch.onnx.export(
                    Scores(head),
                    (features,),
                    str(path),
                    input_names=["features"],
                    dynamic_axes={"features": {0: "rows"}},
                    **chosen,
                )
        session = onnxruntime.InferenceSession(path)
        (scores,) = session.run(None, {session.get_inputs()[0].name: features[:9].numpy()})
        assert torch.allclose(torch.from_numpy(scores), head.scores(head(features[:9])), atol=1e-6)

    def test_distributed_data_parallel(self, tmp_path: Path) -> None:
        mp.spawn(_train_on_a_rank, args=(str(tmp_path / "meeting"),), nprocs=2)


def _train_on_a_rank(rank: int, meeting: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    layout = GroupLayout.from_counts(COUNTS)
    torch.manual_seed(0)
    features = torch.randn(2, 32, IN_FEATURES)
    labels = torch.randint(0, layout.num_labels, (2, 32))
    torch.manual_seed(rank)  # DDP makes the weights those of rank 0
    head = BAGSHead(IN_FEATURES, layout, others_ratio=float("inf"))
    model = nn.parallel.DistributedDataParallel(head)
    head.loss(model(features[rank]), labels[rank]).backward()
    expected = BAGSHead(IN_FEATURES, layout, others_ratio=float("inf"))
    expected.load_state_dict(model.module.state_dict())
    losses = [expected.loss(expected(f), y) for f, y in zip(features, labels, strict=True)]
    (sum(losses) / 2).backward()
    assert torch.allclose(head.fc.weight.grad, expected.fc.weight.grad, atol=1e-6)
    torch.distributed.destroy_process_group()
