"""What a box classifier is to a detection framework: the protocol that every adapter works with.

An adapter asks four things of a classifier (logits, losses, scores, and three facts about itself),
so it is written once for `BAGSHead` and for every method that BAGS is compared with.
"""

from typing import Any, Literal, Protocol

from torch import Tensor

__all__ = ["Classifier", "check_classifier"]


class Classifier(Protocol):
    """A box classifier: features in, logits out, and what logits mean in training and at test.

    `L` below is the number of logits, which is the classifier's own affair; `C` is
    `num_categories`. Labels and score columns follow `background`: "first" means background is
    label 0 and the categories are 1..C, "last" means the categories are 0..C-1 and background is
    C, `None` means no background.

    Adapters move, train and save a classifier with its detector, so it is an `nn.Module` too.

    Attributes:
        in_features: Number of features per RoI.
        num_categories: Number of foreground categories, `C`.
        background: Where background stands among labels and score columns.

    Examples:
        Plain softmax as a classifier:

        >>> import torch
        >>> class Softmax(torch.nn.Linear):
        ...     background = "first"
        ...     num_categories = property(lambda self: self.out_features - 1)
        ...
        ...     def losses(self, logits, labels):
        ...         return {"loss_cls": torch.nn.functional.cross_entropy(logits, labels)}
        ...
        ...     def scores(self, logits):
        ...         return logits.softmax(dim=-1)
        >>> check_classifier(Softmax(8, 3), background="first")
    """

    @property
    def in_features(self) -> int:
        """Number of features per RoI."""

    @property
    def num_categories(self) -> int:
        """Number of foreground categories, `C`."""

    @property
    def background(self) -> Literal["first", "last"] | None:
        """Where background stands among labels and score columns."""

    def __call__(self, features: Tensor, /) -> Tensor:
        """Return logits `[R, L]` of features `[R, in_features]`."""

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return scalar losses by name, for logits `[R, L]` and labels `[R]` (int64).

        Their sum is the classification loss. Every name starts with `loss_cls`, so that the
        entries can stand in a framework's own dictionary of losses.
        """

    def scores(self, logits: Tensor) -> Tensor:
        """Return probabilities `[R, C + 1]` (`[R, C]` without background), each in [0, 1]."""


def check_classifier(classifier: Any, *, background: Literal["first", "last"]) -> None:
    """Check that an object is a `Classifier` in a framework's label convention.

    Args:
        classifier: The object to check.
        background: Where the framework has background: label 0 ("first") or label C ("last").

    Raises:
        TypeError: `classifier` lacks a member of the protocol; the message lists all that it lacks.
        ValueError: `classifier` has another label convention.
    """
    values = ["in_features", "num_categories", "background"]
    methods = ["__call__", "losses", "scores"]
    missing = [name for name in values if not hasattr(classifier, name)]
    missing += [f"{name}()" for name in methods if not callable(getattr(classifier, name, None))]
    if missing or isinstance(classifier, type):
        raise TypeError(
            "Expected `classifier` to be an object with the members of "
            "balanced_group_softmax.adapters.protocol.Classifier, got "
            + (
                f"the class {classifier.__name__}"
                if isinstance(classifier, type)
                else f"{type(classifier).__name__} without {', '.join(missing)}"
            )
        )
    if classifier.background != background:
        raise ValueError(
            f"Expected `classifier` with background={background!r}, as labels are here, "
            f"got background={classifier.background!r}; build it with {background!r}"
        )
