r"""Train and evaluate a detector of detectron2 by a LazyConfig, softmax or Balanced Group Softmax.

    python examples/detectron2/lazyconfig_train_net.py --num-gpus 8 \
        --config-file examples/detectron2/configs/lazy/mask_rcnn_r50_v1.py
    python examples/detectron2/lazyconfig_train_net.py --num-gpus 8 \
        --config-file examples/detectron2/configs/lazy/mask_rcnn_r50_v1_bags.py

The second starts from the first one's checkpoint and trains nothing but the classifier.
Beyond detectron2's own keys, `train.trainable` says what trains (see `freeze`), and
`train.max_gradient_norm` clips gradients. With --resume a run goes on from its last checkpoint.
docs/detectron2.md tells the whole way.
"""

import argparse
import sys
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2_checkpoints import Checkpointer
from detectron2_setup import (
    check_categories,
    errors_of_config,
    register_datasets,
    run,
    show_messages,
)
from torch import nn

from balanced_group_softmax.adapters.detectron2 import freeze
from balanced_group_softmax.cli_program import ended


class ClipGradients(hooks.HookBase):
    """Scales the gradients of a step down to an L2 norm, over all parameters, as the original."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def after_backward(self) -> None:
        if isinstance(self.trainer, AMPTrainer):  # its loss, and so the gradients, are scaled up
            self.trainer.grad_scaler.unscale_(self.trainer.optimizer)
        groups = self.trainer.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.max_norm)


def evaluate(cfg: Any, model: nn.Module) -> Any:
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if comm.is_main_process():
        print_csv_format(results)
    return results


def train(cfg: Any, *, resume: bool) -> None:
    model = instantiate(cfg.model).to(cfg.train.device)
    freeze(model, cfg.train.trainable)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)  # after freezing: it takes what trains
    loader = instantiate(cfg.dataloader.train)
    check_categories(model, cfg.dataloader.train.dataset.names)
    model = create_ddp_model(model, **cfg.train.ddp)

    kind = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = kind(model, loader, optimizer)
    folder, steps = cfg.train.output_dir, cfg.train.max_iter
    checkpointer = Checkpointer(model, folder, trainer=trainer)
    max_norm = cfg.train.get("max_gradient_norm")
    trainer.register_hooks(
        [
            None if max_norm is None else ClipGradients(max_norm),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            on_first(lambda: hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)),
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            on_first(
                lambda: hooks.PeriodicWriter(
                    default_writers(folder, steps), period=cfg.train.log_period
                )
            ),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    goes_on = resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if goes_on else 0, steps)


def on_first(make: Any) -> Any:
    """Return a hook in the first process, and none in the others."""
    return make() if comm.is_main_process() else None


def main(args: argparse.Namespace) -> Any:
    register_datasets(args.dataset)
    with errors_of_config(args.config_file):
        cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    default_setup(cfg, args)
    show_messages(cfg.train.output_dir)
    if not args.eval_only:
        return train(cfg, resume=args.resume)
    model = create_ddp_model(instantiate(cfg.model).to(cfg.train.device), **cfg.train.ddp)
    Checkpointer(model).load(cfg.train.init_checkpoint)
    return evaluate(cfg, model)


if __name__ == "__main__":
    sys.exit(ended(lambda: run(main, __doc__)))
