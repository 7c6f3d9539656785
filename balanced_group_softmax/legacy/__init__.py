"""Files and checkpoints of the original code (mmdetection 1), read without running them."""
