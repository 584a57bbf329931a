"""Evaluates a checkpoint, or a file of detections, on a data list: VOC and COCO average precision.

python eval.py --data data/mine                   # the shipped checkpoint on data/mine/val.json
python eval.py runs/lite/best.pth.tar --data data/vocreal --split val --json metrics.json
python eval.py runs/lite/best.pth.tar --data data/vocreal --report report.html
python eval.py runs/lite/best.pth.tar --data data/vocreal --save-detections detections.json
python eval.py --detections detections.json --data data/vocreal       # of any detector, in the COCO results format
python eval.py runs/lite/best.pth.tar --data data/vocreal --at-scores 0.25 0.4  # precision and recall there
python eval.py --compare a.json runs/lite/best.pth.tar --data data/vocreal
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fpnssd.data.data_list import DataList
from fpnssd.evaluation import intervals
from fpnssd.evaluation.metrics import ImageDetections, compute_metrics, rank
from fpnssd.evaluation.parquet_results import read_parquet
from fpnssd.evaluation.predict import Predictor, check_same_classes, predict
from fpnssd.evaluation.report import write_report
from fpnssd.evaluation.result_files import read_coco, voc_result_paths, write_coco, write_voc
from fpnssd.evaluation.tables import format_table
from fpnssd.inference.detector import check_thresholds, load_detector
from fpnssd.inference.runtimes import runtime_of
from model import DEFAULT_CHECKPOINT, DETECTION, EVALUATION
from utils import (
    HelpFormatter,
    InputError,
    check_outputs,
    error_message,
    escape_unprintable,
    whole_number,
    write_text,
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    escape_unprintable()
    try:
        check_thresholds(args.min_score, args.max_overlap, args.top_k)
        for option, values in (("--at-scores", args.at_scores), ("--voc-overlaps", args.voc_overlaps)):
            if outside := [value for value in values if not 0 <= value <= 1]:
                raise InputError(f"{option} {outside[0]:g}: it must lie in 0..1")
        if args.images and not Path(args.images).is_dir():
            raise InputError(f"--images {args.images} is not a folder")
        data_list = DataList.load(Path(args.data) / f"{args.split}.json", args.images)
        check_outputs(outputs_of(args, data_list), inputs_of(args, data_list), args.overwrite)
        if args.compare:
            print(format_comparison(args.compare, compare(args.compare, data_list, args)))
            return
        detections, context = get_detections(args.detections or args.checkpoint, data_list, args)
        start = time.perf_counter()
        ranked = rank(data_list, detections)
        lowest = 0 if args.detections else args.min_score  # detections of lower scores were not decoded
        at_scores = sorted({max(score, lowest) for score in args.at_scores})
        metrics = compute_metrics(data_list, ranked, sorted({0.5, *args.voc_overlaps}), at_scores) | context
        metrics["seconds"]["score"] = time.perf_counter() - start
        if args.intervals:
            matched = intervals.match(data_list, ranked)
            metrics["intervals"] = intervals.intervals(data_list, matched, args.intervals)
        print(format_table(metrics))
        if args.report:
            write_report(args.report, data_list, ranked, metrics)
        if args.json:
            write_text(args.json, json.dumps(metrics, indent=2), "metrics")
        if args.save_detections:
            write_coco(args.save_detections, data_list, detections)
        if args.voc_files:
            write_voc(args.voc_files, data_list, detections, args.split)
        for path in filter(None, (args.report, args.json, args.save_detections, args.voc_files)):
            print(f"wrote {path}")
    except (InputError, OSError) as error:
        sys.exit(f"eval: {error_message(error)}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument(
        "checkpoint", nargs="?", default=DEFAULT_CHECKPOINT, help="checkpoint, or exported .onnx or .xml file"
    )
    parser.add_argument(
        "--detections", metavar="FILE", help="evaluate a file in the COCO results format, or a folder of bulk_detect.py"
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="compare two checkpoints, .json files or folders"
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip invalid detections of a file")
    parser.add_argument("--data", default="data/voc2012", help="folder of data lists")
    parser.add_argument("--split", default="val", help="name of the data list")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the images, if not that of the data list")
    parser.add_argument("--voc-overlaps", type=float, nargs="+", default=[0.5], help="IoU thresholds of VOC AP")
    default = [DETECTION.min_score]
    parser.add_argument(
        "--at-scores", type=float, nargs="+", default=default, help="score thresholds for precision and recall"
    )
    parser.add_argument("--report", metavar="FILE", help="write an HTML page with charts and pictures of mistakes")
    parser.add_argument("--json", metavar="FILE", help="write the metrics as JSON")
    parser.add_argument("--save-detections", metavar="FILE", help="write the detections in the COCO results format")
    parser.add_argument(
        "--voc-files", metavar="FOLDER", help="write comp4_det_SPLIT_CLASS.txt for the VOC evaluation server"
    )
    parser.add_argument("--overwrite", action="store_true", help="also replace files that this program did not write")
    parser.add_argument("--intervals", type=whole_number(0), default=1000, help="bootstrap resamples; 0: no intervals")
    parser.add_argument("--min-score", type=float, default=EVALUATION.min_score, help="score threshold")
    parser.add_argument("--max-overlap", type=float, default=EVALUATION.max_overlap, help="NMS IoU threshold")
    parser.add_argument("--top-k", type=whole_number(1), default=EVALUATION.top_k, help="maximum detections per image")
    parser.add_argument("--flip", action="store_true", help="average the outputs for the image and its mirror image")
    parser.add_argument("--batch-size", type=whole_number(1), default=16, help="images per forward pass")
    parser.add_argument("--workers", type=whole_number(0), default=2, help="processes that load images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    args = parser.parse_args(argv)
    if args.compare:
        others = ("report", "json", "save_detections", "voc_files", "voc_overlaps", "at_scores")
        refuse(parser, args, "--compare", others)
    elif args.detections:
        refuse(parser, args, "--detections", ("flip", "min_score", "max_overlap", "top_k", "batch_size"))
    return args


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, option: str, others: tuple[str, ...]) -> None:
    """Exits with an error if one of `others` was given too, which have no effect with `option`."""
    conflicting = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) != parser.get_default(name)]
    if conflicting:
        parser.error(f"{option} cannot be combined with {', '.join(conflicting)}")


def outputs_of(args: argparse.Namespace, data_list: DataList) -> list[tuple[str, str | Path | None]]:
    """(kind, path) of each file that will be written, for utils.check_outputs."""
    voc = voc_result_paths(args.voc_files, data_list, args.split) if args.voc_files else ()
    single = [("metrics", args.json), ("report", args.report), ("COCO results", args.save_detections)]
    return [*single, *(("VOC results", path) for path in voc)]


def inputs_of(args: argparse.Namespace, data_list: DataList) -> list[str | None]:
    """The files that are read, other than the images."""
    return [args.checkpoint, args.detections, data_list.path, *(args.compare or ())]


def get_detections(
    source: str, data_list: DataList, args: argparse.Namespace
) -> tuple[list[ImageDetections], dict[str, dict[str, Any]]]:
    """Detections from a .json file or a folder of them, a checkpoint or an exported file.

    Returns:
        One dict per image; and "settings", "seconds" and, for a model, its "configuration", for the report.
    """
    if source == args.detections or source.endswith(".json") or Path(source).is_dir():
        start = time.perf_counter()
        is_folder = Path(source).is_dir()
        detections, problems = (read_parquet if is_folder else read_coco)(source, data_list, args.skip_bad)
        what = "images without detections" if is_folder else "rows left out"
        for problem, count in problems.items():
            print(f"warning: {source}: {what}: {count} x {problem}", file=sys.stderr)
        if not any(len(result["scores"]) for result in detections):
            print(f"warning: {source} has no detections in the images of {data_list.path}", file=sys.stderr)
        settings = {"detections": str(source), "data_list": data_list.path, "skipped": problems}
        return detections, {"settings": settings, "seconds": {"load": time.perf_counter() - start}}
    detector = load_detector(source, args.device, runtime_of(source), args.precision)
    check_same_classes(detector.classes, data_list, source)
    thresholds = {name: getattr(args, name) for name in ("min_score", "max_overlap", "top_k", "flip")}
    predict_fn = Predictor(detector, **thresholds)
    predicted, seconds = predict(predict_fn, data_list, detector.config.image_size, args.batch_size, args.workers)
    assert predicted is not None  # this is the main process
    where = {name: detector.info[name] for name in ("runtime", "device", "precision")}
    settings = {"checkpoint": str(source), "data_list": data_list.path, **where, **thresholds}
    configuration = {"model": asdict(detector.config), "training": detector.info.get("training", {})}
    return predicted, {"settings": settings, "seconds": seconds, "configuration": configuration}


def compare(sources: list[str], data_list: DataList, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The result of intervals.compare for two checkpoints or files of detections."""
    first, second = (
        intervals.match(data_list, rank(data_list, get_detections(source, data_list, args)[0])) for source in sources
    )
    return intervals.compare(data_list, first, second, args.intervals or 1000)


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def format_comparison(sources: list[str], result: dict[str, dict[str, Any]]) -> str:
    """The result of intervals.compare as text, one line per metric.

    Args:
        sources: the two checkpoints or files of detections.
        result: of intervals.compare.
    """
    lines = [f"B - A in points, paired bootstrap over images; A: {sources[0]}, B: {sources[1]}"]
    for name, row in result.items():
        if row["interval"] is None:
            lines.append(f"{name:14} none: the data list has no objects")
            continue
        low, high = row["interval"]
        verdict = "B is better" if low > 0 else "A is better" if high < 0 else "no significant difference"
        lines.append(
            f"{name:14} {100 * row['difference']:+6.1f}  95 % interval {100 * low:+.1f} .. {100 * high:+.1f}  "
            f"B better in {100 * row['better']:.0f} % of resamples  {verdict}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
