"""A checkpointer of detectron2 from whose folder a run goes on, whenever it was killed."""

import os
from pathlib import Path

from detectron2.checkpoint import DetectionCheckpointer


class Checkpointer(DetectionCheckpointer):
    """Replaces the file that names the last checkpoint in one step.

    detectron2 empties it before it writes; a run that is killed in between cannot be resumed.
    """

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the last checkpoint."""
        path = Path(self.save_dir, "last_checkpoint")
        partial = path.with_name(".last_checkpoint")
        partial.write_text(last_filename_basename)
        os.replace(partial, path)
