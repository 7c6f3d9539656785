"""The loss as autograd sees it, for implementations that write their gradient themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_group_softmax.tables import GroupTables


class Kernels(NamedTuple):
    """What such an implementation offers, for tensors as `reference.group_losses` takes them."""

    losses_and_gradient: Callable[..., tuple[Tensor, Tensor | None]]
    """The losses and, with `with_gradient=True`, their gradient [R, L] in the logits' dtype.

    Takes the arguments of `reference.group_losses`, `with_gradient`, and `factors`, [G] or None
    for ones: what each group's loss is multiplied by in the gradient.
    """
    scale_gradient: Callable[[Tensor, Tensor, Tensor, GroupTables], bool]
    """Multiplies a gradient [R, L] in place by factors [G], given the row weights and the tables.

    Returns False, and changes nothing, where it must be computed anew instead.
    """


def group_losses(
    kernels: Kernels,
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    tables: GroupTables,
    *,
    category_weights: Tensor | None,
    normalizers: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The loss of `reference.group_losses`, by `kernels`, differentiable once."""
    losses: Tensor = _GroupLosses.apply(
        logits,
        labels,
        row_weights,
        category_weights,
        normalizers,
        tables,
        {"ignore_index": ignore_index, "reduction": reduction},
        kernels,
    )
    return losses


class _GroupLosses(torch.autograd.Function):
    """Writes the gradient in forward, where a logit is at hand anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        row_weights: Tensor,
        category_weights: Tensor | None,
        normalizers: Tensor | None,
        tables: GroupTables,
        settings: dict[str, Any],
        kernels: Kernels,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, row_weights, category_weights, normalizers)
        ctx.tables, ctx.settings, ctx.kernels = tables, settings, kernels
        # float16 cannot hold a small gradient that a loss scale has not multiplied yet.
        ahead = ctx.needs_input_grad[0] and logits.dtype != torch.float16
        losses, ctx.gradient = kernels.losses_and_gradient(
            logits,
            labels,
            row_weights,
            tables,
            category_weights=category_weights,
            normalizers=normalizers,
            with_gradient=ahead,
            **settings,
        )
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        # Raises after a backward that did not retain the graph.
        logits, labels, row_weights, category_weights, normalizers = ctx.saved_tensors
        factors = grad_losses.expand(ctx.tables.num_groups)
        # Let go of it: autograd would copy a gradient that is held elsewhere too.
        gradient, ctx.gradient = ctx.gradient, None
        with torch.no_grad():
            # None for float16, and in a second backward through a retained graph.
            if gradient is None or not ctx.kernels.scale_gradient(
                gradient, factors, row_weights, ctx.tables
            ):
                _, gradient = ctx.kernels.losses_and_gradient(
                    logits,
                    labels,
                    row_weights,
                    ctx.tables,
                    category_weights=category_weights,
                    normalizers=normalizers,
                    with_gradient=True,
                    factors=factors,
                    **ctx.settings,
                )
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _NotTwiceDifferentiable.apply(gradient, logits, grad_losses)
        return gradient, None, None, None, None, None, None, None


class _NotTwiceDifferentiable(torch.autograd.Function):
    """The identity, with an error for whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "The gradient of grouped_softmax_loss cannot be differentiated again by the "
            "implementations that write it themselves; impl='reference' can"
        )
