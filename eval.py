"""A checkpoint, or a file of detections, and a data list -> the table, and the same numbers as JSON.

python eval.py                                    # the default checkpoint on data/voc2012, split val
python eval.py runs/lite/best.pth.tar --data data/vocreal --split val --json metrics.json
python eval.py runs/lite/best.pth.tar --data data/vocreal --report report.html
python eval.py runs/lite/best.pth.tar --data data/vocreal --save-detections detections.json
python eval.py --detections detections.json --data data/vocreal       # anybody's, in COCO's result format
python eval.py runs/lite/best.pth.tar --data data/vocreal --at-scores 0.25 0.4  # precision and recall above these
python eval.py --compare a.json runs/lite/best.pth.tar --data data/vocreal
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from fpnssd.data.data_list import DataList
from fpnssd.evaluation import intervals
from fpnssd.evaluation.metrics import compute_metrics, percent, rank
from fpnssd.evaluation.predict import Predictor, check_same_classes, predict
from fpnssd.evaluation.report import write_report
from fpnssd.evaluation.result_files import read_coco, voc_result_paths, write_coco, write_voc
from fpnssd.inference.detector import load_detector
from fpnssd.inference.runtimes import runtime_of
from model import DEFAULT_CHECKPOINT, DETECTION, EVALUATION
from utils import InputError, check_outputs, error_message, whole_number, write_text


def main(argv=None):
    args = parse_args(argv)
    try:
        data_list = DataList.load(Path(args.data) / f"{args.split}.json", args.images)
        check_outputs(outputs_of(args, data_list), inputs_of(args, data_list), args.overwrite)
        if args.compare:
            print(format_comparison(args.compare, compare(args.compare, data_list, args)))
            return
        if args.detections:
            detections, told = obtain_saved(args.detections, data_list, args)
        else:
            detections, told = obtain(args.checkpoint, data_list, args)
        start = time.perf_counter()
        ranked = rank(data_list, detections)
        lowest = 0 if args.detections else args.min_score  # below it nothing was decoded
        at_scores = sorted({max(one, lowest) for one in args.at_scores})
        metrics = compute_metrics(data_list, ranked, sorted({0.5, *args.voc_overlaps}), at_scores) | told
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


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--detections", metavar="FILE", help="score this file in COCO's result format instead")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="do these, checkpoints or .json files, differ?")
    parser.add_argument("--skip-bad", action="store_true", help="score a file's good detections, count its bad ones")
    parser.add_argument("--data", default="data/voc2012", help="folder of data lists")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", help="folder of the photographs, if not where the data list says")
    parser.add_argument("--voc-overlaps", type=float, nargs="+", default=[0.5], help="IoUs at which VOC is scored")
    parser.add_argument(
        "--at-scores",
        type=float,
        nargs="+",
        default=[DETECTION.min_score],
        help="precision and recall of what scores more",
    )
    parser.add_argument("--report", metavar="FILE", help="gets the numbers as a web page with charts and pictures")
    parser.add_argument("--json", metavar="FILE", help="gets the numbers")
    parser.add_argument("--save-detections", metavar="FILE", help="gets the detections in COCO's result format")
    parser.add_argument("--voc-files", metavar="FOLDER", help="gets comp4_det_SPLIT_CLASS.txt for VOC's server")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this program did not write, too")
    parser.add_argument("--intervals", type=whole_number(0), default=1000, help="resamples of images; 0 for none")
    parser.add_argument("--min-score", type=float, default=EVALUATION.min_score, help="score threshold")
    parser.add_argument("--max-overlap", type=float, default=EVALUATION.max_overlap, help="NMS IoU threshold")
    parser.add_argument("--top-k", type=whole_number(1), default=EVALUATION.top_k, help="most detections of an image")
    parser.add_argument("--flip", action="store_true", help="mean with what the network says of the mirrored image")
    parser.add_argument("--batch-size", type=whole_number(1), default=16)
    parser.add_argument("--workers", type=whole_number(0), default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    args = parser.parse_args(argv)
    if args.compare:
        others = ("report", "json", "save_detections", "voc_files", "voc_overlaps", "at_scores")
        refuse(parser, args, "--compare", others)
    elif args.detections:
        refuse(parser, args, "--detections", ("flip", "min_score", "max_overlap", "top_k", "batch_size"))
    return args


def outputs_of(args, data_list):
    """(kind, path) of each file that will be written, for utils.check_outputs."""
    voc = voc_result_paths(args.voc_files, data_list, args.split) if args.voc_files else ()
    single = [("metrics", args.json), ("report", args.report), ("COCO results", args.save_detections)]
    return [*single, *(("VOC results", path) for path in voc)]


def inputs_of(args, data_list):
    """The files that are read, but for the photographs."""
    return [args.checkpoint, args.detections, data_list.path, *(args.compare or ())]


def refuse(parser, args, option, others):
    """Ends the program where options were given that have no meaning beside another one."""
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) != parser.get_default(name)]
    if given:
        parser.error(f"{option} takes no {', '.join(given)}")


def obtain_saved(path, data_list, args):
    """(detections, dict of settings and seconds) of a file of detections."""
    start = time.perf_counter()
    detections, problems = read_coco(path, data_list, args.skip_bad)
    settings = {"detections": str(path), "data_list": data_list.path, "skipped": problems}
    return detections, {"settings": settings, "seconds": {"load": time.perf_counter() - start}}


def obtain(source, data_list, args):
    """The same of a checkpoint, with its configuration."""
    detector = load_detector(source, args.device, runtime_of(source), args.precision)
    check_same_classes(detector.classes, data_list, source)
    knobs = {"min_score": args.min_score, "max_overlap": args.max_overlap, "top_k": args.top_k, "flip": args.flip}
    predict_fn = Predictor(detector, **knobs)
    detections, seconds = predict(predict_fn, data_list, detector.config.image_size, args.batch_size, args.workers)
    where = {name: detector.info[name] for name in ("runtime", "device", "precision")}
    settings = {"checkpoint": str(source), "data_list": data_list.path, **where, **knobs}
    configuration = {"model": asdict(detector.config), "training": detector.info.get("training", {})}
    return detections, {"settings": settings, "seconds": seconds, "configuration": configuration}


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def compare(sources, data_list, args):
    """intervals.compare of two checkpoints or .json files of detections, on one list."""
    matched = []
    for source in sources:
        detections, _ = (obtain_saved if source.endswith(".json") else obtain)(source, data_list, args)
        matched.append(intervals.match(data_list, rank(data_list, detections)))
    return intervals.compare(data_list, *matched, args.intervals or 1000)


def format_table(metrics):
    """The numbers in percent, a line a class, and the protocols in full with their 95 % intervals."""
    columns = ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")
    width = max(len("class"), *(len(name) for name in metrics["per_class"]))
    lines = [f"{'class':{width}}  objects  detections  " + "  ".join(f"{c:>12}" for c in columns)]
    for name, row in metrics["per_class"].items():
        numbers = "  ".join(f"{percent(row[c]):>12}" for c in columns)
        lines.append(f"{name:{width}}  {row['objects']:7}  {row['detections']:10}  {numbers}")
    lines.append("")
    for name, value in metrics.items():
        if name.startswith(("voc", "coco")):
            middle = metrics.get("intervals", {}).get(name)
            said = f"  95 %: {percent(middle[0])} .. {percent(middle[1])}" if middle else ""
            lines.append(f"{name:16} {percent(value):>6}{said}")
    best = metrics["best_f1"]
    for row in [*metrics["at_scores"], *filter(None, [best])]:
        highest = ", the highest" if row is best else ""
        lines.append(
            f"above a score of {row['min_score']:.2f}: {percent(row['precision'])} % of the detections are right, "
            f"{percent(row['recall'])} % of the objects are found, F1 {percent(row['f1'])}{highest}"
        )
    if metrics["objects"] == 0:
        lines.append("no object to score against: all numbers are none")
    seconds, settings = metrics.get("seconds", {}), metrics.get("settings", {})
    if seconds:
        total = sum(seconds.values())
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        lines.append(
            f"{metrics['images']} images in {total:.1f} s, {metrics['images'] / total:.1f} images/s: {parts} s"
        )
    if settings:
        lines.append("with " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    return "\n".join(lines)


def format_comparison(sources, result):
    """Which of two detectors is better, by each number, and whether it is more than chance."""
    lines = [f"B - A in points, paired bootstrap over images; A: {sources[0]}, B: {sources[1]}"]
    for name, row in result.items():
        if row["interval"] is None:
            lines.append(f"{name:14} none: no object to score against")
            continue
        low, high = row["interval"]
        verdict = "B is better" if low > 0 else "A is better" if high < 0 else "no difference is shown"
        lines.append(
            f"{name:14} {100 * row['difference']:+6.1f}  95 %: {100 * low:+.1f} .. {100 * high:+.1f}  "
            f"B better in {100 * row['better']:.0f} % of resamples  {verdict}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
