"""Run by torchrun in `test_compare_methods.py`: a comparison in which a process is always late.

    two_ranks_late.py OPTIONS...

The second process waits before it looks for anything that the first may have written.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare_methods
import distributed
import stages
import torchvision_lvis_train as example

SECONDS = 0.7


def late(function: Any) -> Any:
    def waits(*args: Any, **named: Any) -> Any:
        result = function(*args, **named)
        if not distributed.is_first():
            time.sleep(SECONDS)
        return result

    return waits


def main() -> int:
    example.load_data = late(example.load_data)
    stages.on_its_data = late(stages.on_its_data)
    compare_methods.own_options = late(compare_methods.own_options)
    return compare_methods.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
