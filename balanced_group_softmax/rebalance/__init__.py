"""The methods that BAGS is compared with; import the one you need by its path.

Classifiers that take the place of a detector's last layer (`adapters.protocol.Classifier`):

- `softmax.SoftmaxClassifier`: the baseline, re-weight and re-weight-cls
- `focal.FocalClassifier`: focal loss
- `logit_adjustment.LogitAdjustedClassifier`: Balanced Softmax, logit adjustment
- `seesaw.SeesawClassifier`: Seesaw loss
- `eql_v2.EQLv2Classifier`: equalization loss v2
- `federated.FederatedClassifier`: federated loss
- `nearest_class_mean.NearestClassMean`: class means, without training
- `tau_norm_select.TauSelectClassifier`: tau-normalisation for some rows, without training

Functions and samplers around a classifier: `class_weights`, `tau_norm`, `repeat_factors`,
`tail_subset`. docs/methods.md has the table of all.
"""
