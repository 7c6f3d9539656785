"""What is collected where a framework is absent."""

from importlib.util import find_spec

# Doctests are collected from every module, this one too, which is no test and needs detectron2.
collect_ignore = [] if find_spec("detectron2") else ["detectron2_cases.py"]
