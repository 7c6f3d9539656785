"""Time and peak memory of evaluation: `faster-coco-eval` in portions against the official code.

Annotations in the format of LVIS are generated, with a long tail over the categories, and for each
image detections of categories that are verified in it, so that all of them count: half lie around
an object of their category. Detections are streamed to a file as a detector's would be. Each method
then evaluates that file in a process of its own; the figures of both have to agree to 1e-6.

Peak memory is the largest resident size of the process, with Python, torch, the annotations and all
detections, from start to end (Linux, macOS).

    python benchmarks/bench_evaluation.py --images 300
    python benchmarks/bench_evaluation.py --images 5000 --json evaluation.json
    python benchmarks/bench_evaluation.py --images 20000 --methods fast --fixed
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import output_file, seed, whole
from machine import environment
from records import markdown_table, number, write_json

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from detection_results import ImageDetections
from ground_truth import read_ground_truth
from lvis_evaluation import METHODS, evaluate
from results_files import open_writer, read_results

from balanced_group_softmax.cli_program import HelpFormatter, ended

STATUS = """\
exit status: 0 if done; 1 if figures of the methods differ by more than 1e-6; 2 if the usage is
wrong; 130 after Ctrl-C.
"""

IMAGE_SIZE = 640
OBJECTS = 12
NEGATIVE = 8
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Result:
    method: str
    read_seconds: float
    wall_seconds: float
    cpu_seconds: float
    peak_megabytes: float
    metrics: dict[str, float | None]


def write_set(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Write `annotations.json` and `results.json`; return what writing took."""
    generator = np.random.default_rng(options.seed)
    share = 1 / np.arange(1, options.categories + 1)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = list(range(1, options.images + 1))
    seconds = 0.0
    with open_writer(folder / "results.json", ids, list(range(options.categories))) as writer:
        for image_id in ids:
            categories = generator.choice(options.categories, OBJECTS, p=share / share.sum())
            negative = np.setdiff1d(generator.integers(0, options.categories, NEGATIVE), categories)
            boxes = np.concatenate(
                [
                    generator.uniform(0, 0.7 * IMAGE_SIZE, (OBJECTS, 2)),
                    generator.uniform(8, 0.3 * IMAGE_SIZE, (OBJECTS, 2)),
                ],
                axis=1,
            )
            images.append(
                {
                    "id": image_id,
                    "width": IMAGE_SIZE,
                    "height": IMAGE_SIZE,
                    "neg_category_ids": negative.tolist(),
                    "not_exhaustive_category_ids": categories[:1].tolist(),
                }
            )
            annotations += [
                {"id": len(annotations) + i, "image_id": image_id, "category_id": c, "bbox": box}
                for i, (c, box) in enumerate(zip(categories.tolist(), boxes.tolist(), strict=True))
            ]
            found = make_detections(image_id, categories, boxes, negative, generator, options)
            started = time.perf_counter()
            writer.append(found)
            seconds += time.perf_counter() - started
    letters = np.repeat(["f", "c", "r"], -(-options.categories // 3)).tolist()
    rows = [{"id": i, "frequency": letters[i]} for i in range(options.categories)]
    content = {"images": images, "annotations": annotations, "categories": rows}
    (folder / "annotations.json").write_text(json.dumps(content))
    size = (folder / "results.json").stat().st_size / 1e6
    return {"write seconds": seconds, "megabytes": size}


def make_detections(
    image_id: int,
    categories: np.ndarray,
    boxes: np.ndarray,
    negative: np.ndarray,
    generator: np.random.Generator,
    options: argparse.Namespace,
) -> ImageDetections:
    n = options.detections
    near = generator.integers(0, OBJECTS, n)
    verified = generator.choice(np.concatenate([categories, negative]), n)
    return ImageDetections(
        image_id,
        np.where(generator.random(n) < 0.5, categories[near], verified).astype(np.int64),
        np.abs(boxes[near] * generator.normal(1, 0.1, (n, 4))),
        generator.random(n),
    )


def work(folder: Path, method: str, fixed: bool) -> None:
    """Evaluate what is in the folder, and print the outcome as JSON: the body of a process."""
    truth = read_ground_truth(folder / "annotations.json")
    started = time.perf_counter()
    detections = read_results(
        folder / "results.json", truth.file_image_ids, truth.file_category_ids
    )
    read = time.perf_counter() - started
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = evaluate(truth, detections, method=method, fixed=fixed)
    outcome = {
        "read_seconds": read,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "metrics": metrics,
    }
    print(json.dumps(outcome))


def measure(folder: Path, method: str, options: argparse.Namespace) -> Result:
    command = [sys.executable, __file__, "--work", str(folder), "--methods", method]
    command += ["--fixed"] if options.fixed else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{method} failed with exit status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    peak = usage.ru_maxrss * unit / 1e6
    return Result(method=method, peak_megabytes=peak, **json.loads(output.splitlines()[-1]))


def largest_difference(results: list[Result]) -> float:
    """Return how far figures are apart, of 1."""
    first, *others = results
    return max(
        (
            abs((value or 0) - (other.metrics[name] or 0)) / 100
            for other in others
            for name, value in first.metrics.items()
        ),
        default=0.0,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.work:
        work(options.work, options.methods[0], options.fixed)
        return 0
    facts = environment(torch.device("cpu"))
    for package in ("lvis", "faster-coco-eval", "pycocotools"):
        facts[package] = _version(package)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        writing = write_set(Path(name), options)
        print(", ".join(f"{key}: {value:.0f}" for key, value in writing.items()), flush=True)
        results = []
        for method in options.methods:
            results.append(measure(Path(name), method, options))
            print(f"{method}: {results[-1].wall_seconds:.1f} s", flush=True)
    slowest = max(result.cpu_seconds for result in results)
    rows = [
        [
            result.method,
            number(result.read_seconds),
            number(result.wall_seconds),
            number(result.cpu_seconds),
            number(result.peak_megabytes),
            number(slowest / result.cpu_seconds),
        ]
        for result in results
    ]
    header = ["method", "read s", "evaluate s", "CPU s", "peak MB", "times faster (CPU)"]
    print(f"\n{options.images} images x {options.detections} detections\n")
    print(markdown_table(header, rows))
    difference = largest_difference(results)
    if len(results) > 1:
        print(f"\nLargest difference of a figure: {difference:.1e}")
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        record = {
            "benchmark": "evaluation",
            "environment": facts,
            "options": settings,
            "writing": writing,
            "results": [asdict(result) for result in results],
        }
        write_json(options.json, record)
    return 1 if difference > TOLERANCE else 0


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--images", type=whole, default=1000, metavar="N", help="images (default: 1000)")
    add(
        "--detections",
        type=whole,
        default=300,
        metavar="N",
        help="detections of an image (default: 300)",
    )
    add(
        "--categories",
        type=whole,
        default=1203,
        metavar="C",
        help="categories (default: 1203, those of LVIS v1)",
    )
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"methods to time, of {', '.join(METHODS)} (default: all of them)",
    )
    add("--fixed", action="store_true", help="AP fixed and pooled AP too")
    add("--seed", type=seed, default=0, metavar="N", help="seed of what is drawn (default: 0)")
    add("--json", type=output_file, metavar="OUT", help="write the record here")
    add("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(ended(main))
