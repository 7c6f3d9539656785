"""Without mmdet the tests of this folder skip; what they share cannot even be imported."""

collect_ignore = ["mmdet_cases.py"]
