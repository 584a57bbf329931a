"""Detect objects in millions of pictures, on this machine or on a Ray cluster; writes Parquet, a row per picture.

    python bulk_detect.py --images archive/ --out found/        # if it was stopped, the same command continues
    python bulk_detect.py --images list.txt "more/*.jpg" --out found/ --concurrency 2 --cpus-per-worker 4
    python bulk_detect.py --images s3://bucket/photos --out s3://bucket/found --address auto --gpus-per-worker 1

Read back: pandas.read_parquet("found"). It needs pip install -e '.[bulk]'.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fpnssd.inference.addresses import list_addresses
from fpnssd.inference.bulk import ResultFolder, Worker
from fpnssd.inference.detector import check_thresholds, load_detector
from model import DEFAULT_CHECKPOINT, DETECTION
from utils import (
    HelpFormatter,
    InputError,
    check_outputs,
    error_message,
    escape_unprintable,
    hash_file,
    whole_number,
)

LOCAL_STORE = 256 * 2**20  # bytes of shared memory for a local Ray: it holds only addresses and rows
BLOCK_BATCHES = 16  # batches per block, the unit of work that Ray assigns, and repeats if the worker dies
RETRIES = 3  # per block whose worker dies
MAX_ERRORED_BLOCKS = 100  # more failed blocks end the run: a few bad pictures cannot be the cause


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    escape_unprintable()
    try:
        check_thresholds(args.min_score, args.max_overlap, args.top_k)
        import_ray()
        check_outputs([("detections", Path(args.out) / "part-0.parquet")] if "://" not in args.out else [], args.images)
        load_detector(args.checkpoint, "cpu")  # raises errors here, where they are clear, and not in a worker
        with ResultFolder(args.out, settings_of(args)) as result:
            left = result.left(list_addresses(args.images))
            seconds = run(left, result, args) if len(left) else 0.0
            print(format_summary(result, seconds))
    except (InputError, OSError) as error:
        sys.exit(f"bulk_detect: {error_message(error)}")
    except KeyboardInterrupt:
        sys.exit("bulk_detect: stopped; the same command continues with the remaining pictures")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=(__doc__ or "").split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="ADDRESS",
        help="folders, local globs, text files of addresses, Parquet files of addresses or images; local, s3:// or gs://",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for the Parquet files; local, s3:// or gs://"
    )
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="checkpoint, or exported .onnx or .xml file")
    parser.add_argument("--address", default="local", help="address of a Ray cluster; local starts Ray on this machine")
    parser.add_argument("--concurrency", type=whole_number(1), help="number of workers (default: as many as fit)")
    parser.add_argument("--cpus-per-worker", type=whole_number(1), default=1, help="CPU cores per worker")
    parser.add_argument(
        "--gpus-per-worker", type=float, help="may be a fraction; 0 uses the CPU (default: 1 if there is a GPU here)"
    )
    parser.add_argument("--min-score", type=float, default=DETECTION.min_score, help="score threshold")
    parser.add_argument("--max-overlap", type=float, default=DETECTION.max_overlap, help="NMS IoU threshold")
    parser.add_argument("--top-k", type=whole_number(1), default=DETECTION.top_k, help="maximum detections per image")
    parser.add_argument("--batch-size", type=whole_number(1), default=8, help="images per forward pass")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    args = parser.parse_args(argv)
    if args.gpus_per_worker is None:
        args.gpus_per_worker = float(torch.cuda.is_available())
    return args


def import_ray() -> None:
    """Imports Ray with suitable settings; raises an InputError if it or pyarrow is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # the default is too short for a busy machine
    try:
        import pyarrow  # noqa: F401  # optional
        import ray.data  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install -e '.[bulk]'") from error


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that determine the detections; all rows of one --out share them."""
    names = ("min_score", "max_overlap", "top_k", "precision")
    return {"checkpoint_sha256": hash_file(args.checkpoint)} | {name: getattr(args, name) for name in names}


def run(left: Any, result: ResultFolder, args: argparse.Namespace) -> float:
    """Detects objects in the pictures at these addresses, and writes their rows.

    Args:
        left: pyarrow array of addresses.
        result: receives the rows, also those before an error or Ctrl-C.
        args: of the command line.

    Returns:
        Elapsed seconds, including the start of Ray.

    Raises:
        InputError: if workers cannot be started, or pictures whose worker died each time are left.
        OSError: if rows cannot be written.
    """
    import ray  # optional

    begin = time.monotonic()
    with ray_session(args) as workers:
        try:
            # The pictures of a block whose worker died each time are then tried one by one.
            for block_rows in (args.batch_size * BLOCK_BATCHES, 1):
                for rows in detections(left, block_rows, workers, args):
                    result.add(rows)
                result.write()
                left = result.left(address.as_py() for address in left)
                if not len(left):
                    return time.monotonic() - begin
        except ray.exceptions.RayError as error:
            raise InputError(error_message(error)) from error
        finally:
            result.write()
    raise InputError(
        f"{len(left)} pictures have no row, the first is {left[0]}: their workers died {RETRIES + 1} times. The same "
        "command tries them again"
    )


@contextlib.contextmanager
def ray_session(args: argparse.Namespace) -> Iterator[int]:
    """Connects to Ray, or starts it on this machine, for a with block; yields the number of workers."""
    import ray  # optional

    local: dict[str, Any] = {}
    if args.address == "local":
        cpus = args.concurrency * args.cpus_per_worker if args.concurrency else None
        local = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": LOCAL_STORE}
    # Workers on other machines need this code and the pictures' relative paths at the same place as here.
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent)}}
    try:
        ray.init(args.address, runtime_env=environment, **local)
    except Exception as error:  # of many types
        ray.shutdown()
        raise InputError(f"Ray did not start: {error_message(error)}") from error
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, in place of Ray's own handler
    try:
        available = ray.cluster_resources()
        per_worker = {"CPU": args.cpus_per_worker, "GPU": args.gpus_per_worker}
        fitting = min(int(available.get(name, 0) / number) for name, number in per_worker.items() if number)
        if not (args.concurrency or fitting):
            names = ", ".join(f"{available.get(name, 0):g} {name}" for name in per_worker)
            raise InputError(f"no worker fits, Ray has {names}: lower --cpus-per-worker or --gpus-per-worker")
        yield args.concurrency or fitting
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()


def detections(left: Any, block_rows: int, workers: int, args: argparse.Namespace) -> Iterator[Any]:
    """Yields pyarrow tables of rows, as Ray Data's workers finish their blocks.

    Args:
        left: pyarrow array of addresses.
        block_rows: addresses in a block.
        workers: number of workers.
        args: of the command line.
    """
    import pyarrow as pa  # optional
    import ray

    ray.data.DataContext.get_current().max_errored_blocks = MAX_ERRORED_BLOCKS
    blocks = [pa.table({"address": left.slice(start, block_rows)}) for start in range(0, len(left), block_rows)]
    thresholds = {"min_score": args.min_score, "max_overlap": args.max_overlap, "top_k": args.top_k}
    device = "cuda" if args.gpus_per_worker else "cpu"
    warnings.filterwarnings("ignore", ".*ray_remote_args.*")  # there is no other way to set max_task_retries
    dataset = ray.data.from_arrow(blocks).map_batches(
        Worker,
        fn_constructor_args=(
            os.getcwd(), args.checkpoint, device, args.precision, thresholds, args.batch_size, args.cpus_per_worker,
        ),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=args.cpus_per_worker,
        num_gpus=args.gpus_per_worker,
        max_task_retries=RETRIES,
    )  # fmt: skip
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def format_summary(result: ResultFolder, seconds: float) -> str:
    """The summary of a result as text.

    Args:
        result: the result, of which all rows are counted.
        seconds: duration of this run.
    """
    counts = result.summary()
    pace = f" ({result.written} of them now, {result.written / seconds:.1f} a second)" if result.written else ""
    lines = [f"{result.address}: {counts['pictures']} pictures{pace}"]
    for name, counter in (("failed", counts["errors"]), ("objects", counts["objects"])):
        lines += [f"{sum(counter.values())} {name}", *(f"  {count} {kind}" for kind, count in counter.most_common())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
