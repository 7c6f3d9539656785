"""Train a part of a model and keep the rest as it is, whatever the framework."""

from collections.abc import Collection, Iterator

from torch import nn

__all__ = ["FrozenModules", "freeze_all_but"]


class FrozenModules(nn.Module):
    """A model's last child, which puts the frozen modules back into eval mode.

    `nn.Module.train` visits children in order, so this one is told last and has the last word. The
    frozen modules are in a tuple, which does not register them: the state dict and `parameters()`
    do not see them twice, while deep copies and pickles keep pointing at the right ones. It takes
    no hook and no changed method, so whatever works with modules works with a frozen model.

    `freeze_all_but` makes these.
    """

    def __init__(self, modules: dict[str, nn.Module], parameters: Collection[str]) -> None:
        super().__init__()
        self.names = tuple(modules)
        self.frozen = tuple(modules.values())
        self.parameter_names = frozenset(parameters)

    def train(self, mode: bool = True) -> "FrozenModules":
        """Take the mode, and set the frozen modules to eval mode whatever it is."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def extra_repr(self) -> str:
        """The names of the frozen modules, for printing."""
        return ", ".join(self.names)


def freeze_all_but(
    model: nn.Module,
    trainable: Collection[nn.Module],
    *,
    follow_train: tuple[type[nn.Module], ...] = (),
) -> list[nn.Parameter]:
    """Let only some modules of a model train, and return the parameters that do.

    Other parameters get `requires_grad=False`; other modules go to eval mode and return to it
    whenever `model.train()` is called. Another call takes the place of the first; with `[model]`
    nothing is frozen any more, but for the parameters that were frozen before the first call.

    Args:
        model: The model; it gets a child `frozen` without parameters.
        trainable: Submodules of `model` that train, or `[model]`.
        follow_train: Kinds of modules that follow `train()` even when no part of them trains, since
            their mode chooses a procedure rather than how a layer computes. Their children do not.

    Raises:
        ValueError: `model` has something else called `frozen`, or nothing would train.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> len(freeze_all_but(model, [model[2]]))
        2
        >>> [layer.training for layer in model.train()]
        [False, False, True, True]
        >>> model.frozen
        FrozenModules(0, 1)
    """
    before = getattr(model, "frozen", None)
    if before is not None and not isinstance(before, FrozenModules):
        raise ValueError(
            "Expected `model` without an attribute of its own named `frozen`, got one of type "
            f"{type(before).__name__}"
        )
    thawed = frozenset() if before is None else before.parameter_names
    can_train = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in thawed
    }
    kept = {parameter for module in trainable for parameter in module.parameters()}
    trains = [parameter for parameter in can_train.values() if parameter in kept]
    if not trains:
        raise ValueError(
            "Expected parameters that can train in what is to train, got none: all had "
            "requires_grad=False before"
        )

    if before is not None:
        del model.frozen
        for module in before.frozen:
            module.train(model.training)
    for parameter in can_train.values():
        parameter.requires_grad_(parameter in kept)
    frozen = dict(_frozen_modules(model, set(trainable), follow_train))
    names = [name for name, parameter in can_train.items() if parameter not in kept]
    if frozen or names:
        model.frozen = FrozenModules(frozen, names).train(model.training)
    return trains


def _frozen_modules(
    module: nn.Module,
    trainable: set[nn.Module],
    follow_train: tuple[type[nn.Module], ...],
    prefix: str = "",
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest submodules without a trainable part, by name."""
    if module in trainable:
        return
    for name, child in module.named_children():
        if isinstance(child, follow_train) or not trainable.isdisjoint(child.modules()):
            yield from _frozen_modules(child, trainable, follow_train, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
