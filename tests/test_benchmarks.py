"""The benchmarks run, at sizes that measure nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("bench_loss.py", ["--rows", "16", "--foreground", "0.25", "--rounds", "1"]),
        ("bench_detections.py", ["--rows", "20", "--categories", "30", "--rounds", "1", "--quick"]),
    ],
    ids=["loss", "detections"],
)
def test_benchmark_runs(script: str, options: list[str], tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *options, "--json", record],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| rows |" in done.stdout or "| scores |" in done.stdout
    written = json.loads(record.read_text())
    assert written["results"]
    assert {"commit", "torch"} <= written["environment"].keys()
