"""A checkpoint and a data list -> the table, and the same numbers as JSON.

    python eval.py                                    # the default checkpoint on data/voc2012, split val
    python eval.py runs/lite/best.pth.tar --data data/vocreal --split val --json metrics.json

`evaluate` scores whatever predicts, for training too.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from datasets import DataError, DataList, DetectionDataset, make_loader
from metrics import compute_metrics
from model import DEFAULT_CHECKPOINT, load_checkpoint, postprocess
from utils import InputError, autocast, explain, pick_device, pick_precision, whole_number, written_whole


def main(argv=None):
    args = parse_args(argv)
    try:
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        model = load_checkpoint(args.checkpoint)["model"].to(device)
        data_list = DataList.load(Path(args.data) / f"{args.split}.json", args.images)
        check_same_classes(model.config.classes, data_list, args.checkpoint)
        knobs = {"min_score": args.min_score, "max_overlap": args.max_overlap, "top_k": args.top_k}
        predict_fn = make_predict_fn(model, device, precision, **knobs)
        start = time.perf_counter()
        metrics = evaluate(predict_fn, data_list, model.config.image_size, args.batch_size, args.workers)
        seconds = time.perf_counter() - start
    except (InputError, OSError) as error:
        sys.exit(f"eval: {explain(error)}")
    metrics["settings"] = {
        "checkpoint": str(args.checkpoint),
        "data_list": data_list.path,
        "device": device.type,
        "precision": precision,
        **knobs,
    }
    print(format_table(metrics))
    print(f"{len(data_list)} images in {seconds:.1f} s, {len(data_list) / seconds:.1f} images/s, all included")
    if args.json:
        with written_whole(args.json) as temporary:
            Path(temporary).write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        print(f"wrote {args.json}")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--data", default="data/voc2012", help="folder of data lists")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", help="folder of the photographs, if not where the data list says")
    parser.add_argument("--json", help="file that gets the numbers")
    parser.add_argument("--min-score", type=float, default=0.01)
    parser.add_argument("--max-overlap", type=float, default=0.45)
    parser.add_argument("--top-k", type=whole_number(1), default=200)
    parser.add_argument("--batch-size", type=whole_number(1), default=16)
    parser.add_argument("--workers", type=whole_number(0), default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    return parser.parse_args(argv)


def make_predict_fn(model, device, precision, min_score=0.01, max_overlap=0.45, top_k=200):
    """predict_fn(images uint8 (B, 3, S, S), sizes [(h, w)]) -> one dict of detections an image, on the CPU."""
    model = model.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def predict_fn(images, sizes):
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            offsets, logits = model(images)
        results = postprocess(offsets, logits, model.priors, sizes, min_score, max_overlap, top_k)
        return [{name: tensor.cpu() for name, tensor in result.items()} for result in results]

    return predict_fn


def evaluate(predict_fn, data_list, image_size=300, batch_size=16, workers=2):
    """The metrics (see metrics.compute_metrics) of whatever predict_fn answers for every image of a DataList."""
    loader = make_loader(DetectionDataset(data_list, image_size), batch_size, workers=workers)
    detections = []
    for batch in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None):
        detections += predict_fn(batch["image"], batch["size"])
    return compute_metrics(data_list, detections)


def check_same_classes(classes, data_list, checkpoint):
    if tuple(classes) != tuple(data_list.classes):
        raise DataError(
            f"{checkpoint} knows {len(classes)} classes ({_some(classes)}), but {data_list.path} has "
            f"{len(data_list.classes)} ({_some(data_list.classes)}): evaluate on a list made with the same classes"
        )


def _some(names):
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def format_table(metrics):
    """The numbers in percent, a line a class, and the protocols in full."""

    def percent(value):
        return "none" if value is None else f"{100 * value:.1f}"

    columns = ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")
    width = max(len("class"), *(len(name) for name in metrics["per_class"]))
    lines = [f"{'class':{width}}  objects  detections  " + "  ".join(f"{c:>12}" for c in columns)]
    for name, row in metrics["per_class"].items():
        numbers = "  ".join(f"{percent(row[c]):>12}" for c in columns)
        lines.append(f"{name:{width}}  {row['objects']:7}  {row['detections']:10}  {numbers}")
    lines.append("")
    for name, value in metrics.items():
        if name.startswith(("voc", "coco")):
            lines.append(f"{name:16} {percent(value):>6}")
    settings = metrics.get("settings", {})
    if settings:
        lines.append("with " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
