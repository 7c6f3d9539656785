"""`python -m balanced_group_softmax`, the same as the command `balanced-group-softmax`."""

import sys

from balanced_group_softmax.cli import main

if __name__ == "__main__":
    sys.exit(main())
