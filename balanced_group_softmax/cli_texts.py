"""What the help of the commands says below their options; indented lines stay as they are."""

__all__ = ["CONVERT", "EXPORT", "GROUPS", "IMPORT", "INSPECT", "MAIN"]

MAIN = """\
examples, for a first look at a data set and at a trained detector:
  balanced-group-softmax groups train.json --plot groups.png --out layout.json
  balanced-group-softmax inspect bags.pth --plot norms.png

`balanced-group-softmax COMMAND --help` has examples, and says what the output means.

exit status:
  0    done
  2    wrong usage, or an input or output that is not what it should be;
       standard error says in a line what was expected and what came
  130  interrupted by Ctrl-C
A file is written whole or not at all, and takes the place of one that is there already.
"""

GROUPS = """\
examples:
  balanced-group-softmax groups lvis_v1_train.json
  balanced-group-softmax groups train.json --plot groups.png
  balanced-group-softmax groups train.json --thresholds 5 50 500
  balanced-group-softmax groups train.json --background last --out layout.json

A category's group is given by its training instances: `instance_count` where the file states it
(LVIS), or else its annotations that are not `iscrowd`. A category that was never seen is in the
lowest group; a group without categories is left out, with a warning.

output, a line for each group:
  group       its name, LOW_HIGH: at least LOW instances, fewer than HIGH;
              bg_fg tells background from foreground
  columns     of the classifier: one for each category, and one for `others`
  instances   of all its categories in training, and their share of all
  fewest      the category with the fewest instances, and with the most
The row `all` has the width of the classifier under `columns`. In the picture a bar or step is a
category, and dashed lines are the thresholds.
"""

INSPECT = """\
examples:
  balanced-group-softmax inspect bags.pth
  balanced-group-softmax inspect epoch_12.pth --plot norms.png

Every BAGSHead is found in dicts by name, up to eight deep: in a bare state dict, under `model` or
`state_dict`, in each stage of a cascade; checkpoints of torchvision, mmdet 3, detectron2 and the
examples. Nothing in the file is run.

output, for each head its place and a line for each group:
  columns     of the classifier: one for each category, and one for `others`
  mean, min, max
              of the L2 norms of the categories' rows of weights
  others      the norm of the row of `others`
In figure 1 of the paper a plain softmax has larger norms for frequent categories, which is what the
groups are there to even out. In the picture a dot is a category, a line the mean of its group, and
a dashed line its `others`. For a checkpoint without a layout, what may be its classifier is named.
"""

IMPORT = """\
example:
  balanced-group-softmax import-groups data/lvis --out layout.json

The layout is for `GroupLayout.load`, for `layout=` in configs, and for `convert-checkpoint
--groups`. Files beside label2binlabel.pt are checked against it, and give the groups their names.
Nothing in the files is run.

output: the layout that was written, with how many categories are in each group.
"""

EXPORT = """\
example:
  balanced-group-softmax export-legacy lvis_v0.5_train.json --out data/lvis

The files are those that the original (mmdetection 1) reads for training: of groups, of weights and
of images by category. Category ids have to be 1..C, which the original takes for labels.

output: the folder, and the groups that its files describe.
"""

CONVERT = """\
examples:
  balanced-group-softmax convert-checkpoint faster_rcnn.pth --out softmax.pth \\
      --to torchvision
  balanced-group-softmax convert-checkpoint gs_faster_rcnn.pth --out bags.pth \\
      --to mmdet --groups data/lvis

Weights keep their values and get the names of today; a BAGS checkpoint gets its layout as well. The
original counts pixels in its own way: docs/migration.md says how to get its boxes from its weights.
Nothing in the file is run.

output: the file, and how many entries it has; `inspect` shows what they are.
"""
