"""The plain softmax classifier in the form that the library's adapters take."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class SoftmaxClassifier(nn.Linear):
    """A linear layer, cross-entropy and softmax.

    As a detector's classifier, where label 0 is background, it meets
    `balanced_group_softmax.adapters.protocol.Classifier`.
    """

    background: Literal["first"] = "first"

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "SoftmaxClassifier":
        """Copy a trained layer."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.load_state_dict(linear.state_dict())
        return made

    @property
    def num_categories(self) -> int:
        return self.out_features - 1

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss_cls": self.loss(logits, labels)}

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)
