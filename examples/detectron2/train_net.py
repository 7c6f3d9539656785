r"""Train and evaluate a detector of detectron2 by a YAML config, softmax or Balanced Group Softmax.

    C=examples/detectron2/configs
    python examples/detectron2/train_net.py --num-gpus 8 \
        --config-file $C/mask_rcnn_r50_lvis_v1.yaml
    python examples/detectron2/train_net.py --num-gpus 8 \
        --config-file $C/mask_rcnn_r50_lvis_v1_bags.yaml

The second starts from the first one's classifier and trains nothing else. With --resume a run goes
on from its last checkpoint; with --eval-only it is evaluated. docs/detectron2.md tells the whole
way.
"""

import argparse
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, default_setup
from detectron2_checkpoints import Checkpointer
from detectron2_evaluation import LVISReport
from detectron2_setup import (
    check_categories,
    errors_of_config,
    register_datasets,
    run,
    show_messages,
)
from torch import nn

from balanced_group_softmax.adapters.detectron2 import add_bags_config, freeze
from balanced_group_softmax.cli_program import ended


class Trainer(DefaultTrainer):
    """detectron2's trainer, with freezing and with this project's evaluation."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model: nn.Module = super().build_model(cfg)
        freeze(model, cfg.MODEL.BAGS.TRAIN)  # before the optimiser, which takes what trains
        return model

    def build_hooks(self) -> list[Any]:
        # Called when model and data are there, before a hook takes the checkpointer that was made.
        model = self._trainer.model
        check_categories(getattr(model, "module", model), self.cfg.DATASETS.TRAIN)
        self.checkpointer = Checkpointer(model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        hooks: list[Any] = super().build_hooks()
        return hooks

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> LVISReport:
        return LVISReport(
            dataset_name,
            one_with_annotations(cfg.DATASETS.TRAIN),
            ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",),
            output_folder or str(Path(cfg.OUTPUT_DIR, "inference", dataset_name)),
        )


def one_with_annotations(names: Sequence[str]) -> str | None:
    """Return the training set to count in, None if there are several or its file is not here."""
    paths = [MetadataCatalog.get(name).get("json_file") for name in names]
    return names[0] if len(paths) == 1 and paths[0] and Path(paths[0]).is_file() else None


def make_config(path: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a YAML config with the keys of BAGS; overrides are keys and values in turn."""
    cfg = get_cfg()
    add_bags_config(cfg)
    cfg.merge_from_file(path)
    cfg.merge_from_list(list(overrides))
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace) -> Any:
    register_datasets(args.dataset)
    with errors_of_config(args.config_file):
        cfg = make_config(args.config_file, args.opts)
    default_setup(cfg, args)
    show_messages(cfg.OUTPUT_DIR)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    return Trainer.test(cfg, model)


if __name__ == "__main__":
    sys.exit(ended(lambda: run(main, __doc__)))
