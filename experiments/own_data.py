"""The finetune preset on three small data sets: BCCD's blood cells, thermal dogs and people, aquarium.

    python -m experiments.own_data bccd thermal aquarium --minutes 20            # from the checkpoint that ships
    python -m experiments.own_data bccd --minutes 10 --start imagenet
    python -m experiments.own_data aquarium --minutes 5 --photographs 50 --seed 1
    python -m experiments.own_data bccd --minutes 4 --choose --set lr=0.0005     # train -> val: where choices are made

A row is one run of `train.py --preset finetune --minutes N` as a process of its own, without a val list, whose last
weights are scored on the test list. Where choices are made (--choose), on val instead: BCCD has none, so its trainval
is divided as create_data_lists.py does. Wall clock and CPU minutes are those of the whole process, the load is the mean
of the machine's before and after. The sets lie in ../shared (--shared); they are not part of the repository.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from create_data_lists import create_data_lists
from experiments.accuracy import add_row, chosen, hardware, revision
from fpnssd.data.data_list import DataList
from fpnssd.data.split import VAL_SHARE
from fpnssd.data.voc import read_voc
from fpnssd.evaluation import intervals
from fpnssd.evaluation.metrics import compute_metrics, rank
from fpnssd.evaluation.predict import Predictor, predict
from fpnssd.inference.detector import torch_detector
from model import load_checkpoint
from utils import InputError, error_message, write_text

SETS = {  # folder in ../shared, and the splits for training and for the score
    "bccd": ("BCCD", "trainval", "test"),
    "thermal": ("sets/thermal_dogs_people", "train", "test"),
    "aquarium": ("sets/aquarium", "train", "test"),
}
SCORES = ("voc2007_ap50", "coco_ap50", "coco_ap")
RESULTS = Path("experiments/own_data.csv")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="+", metavar="SET", choices=SETS, help=", ".join(SETS))
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--start", default="shipped", choices=("shipped", "imagenet"))
    parser.add_argument("--photographs", type=int, help="train on so many, drawn by the seed, instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--choose", action="store_true", help="score on val instead of test")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of TrainConfig")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            run(name, args)
    except (InputError, OSError) as error:
        sys.exit(f"own_data: {error_message(error)}")


def run(name, args):
    """Trains on a set, scores the last weights and adds the row."""
    asked = {
        "set": name, "start": args.start, "scored_on": "val" if args.choose else "test", "minutes_asked": args.minutes,
        "photographs": args.photographs or "all", "changes": " ".join(args.set), "seed": args.seed,
    }  # fmt: skip
    asked = {key: str(value) for key, value in asked.items()}
    train_path, test_path = make_lists(name, args)
    run_name = f"own_{name}_{time.strftime('%H%M%S')}_{os.getpid()}"  # two may start in the same second
    taken = train_process(run_name, train_path, args)
    checkpoint = load_checkpoint(Path("runs") / run_name / "last.pth.tar")
    row = {**asked, "run": run_name, "images": len(DataList.load(train_path)), **taken}
    seconds = sum(epoch["seconds"] for epoch in checkpoint["log"])
    row |= {"steps": checkpoint["step"], "samples": checkpoint["step"] * checkpoint["step_images"]}
    row |= {"images_per_s": round(row["samples"] / seconds, 2), "last_lr": f"{checkpoint['log'][-1]['lr']:.1e}"}
    row |= score(checkpoint["model"], DataList.load(test_path))
    row |= {"git": revision(), "hardware": hardware(), "threads": torch.get_num_threads(), "date": str(date.today())}
    add_row(args.results, row, asked)
    print(", ".join(f"{key} {value}" for key, value in row.items()))


def make_lists(name, args):
    """Paths of the training list, with --photographs a part of it, and of the list to score on."""
    folder, train_split, test_split = SETS[name]
    out = Path("data") / f"own_{name}{'_choose' if args.choose else ''}"
    divided = args.choose and name == "bccd"
    splits = [train_split] if divided else [train_split, "val" if args.choose else test_split]
    train_path, test_path = (out / f"{split}.json" for split in (("train", "val") if divided else splits))
    if not test_path.is_file():
        found = [read_voc([args.shared / folder], split) for split in splits]
        create_data_lists(found, out, val_share=VAL_SHARE if divided else None, picture=False)
    if args.photographs:
        content = json.loads(train_path.read_text(encoding="utf-8"))
        ids = sorted(image["id"] for image in content["images"])
        drawn = set(random.Random(args.seed).sample(ids, args.photographs))
        train_path = out / f"{train_path.stem}_{args.photographs}_{args.seed}.json"
        write_text(train_path, json.dumps(chosen(content, lambda image_id: image_id in drawn)), "data list")
    return train_path, test_path


def train_process(run_name, train_path, args):
    """Runs train.py; minutes of wall clock and CPU that it took, and the load of the machine."""
    weights = [] if args.start == "shipped" else ["--weights", ""]
    settings = [f"train_split={train_path.stem}", "val_split=", *args.set]
    command = [sys.executable, "train.py", "--preset", "finetune", "--data", str(train_path.parent), "--name", run_name]
    command += ["--minutes", str(args.minutes), "--seed", str(args.seed), *weights, "--set", *settings]
    load, before, start = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    load = (load + os.getloadavg()[0]) / 2
    return {"minutes_taken": round(seconds / 60, 2), "cpu_minutes": round(cpu / 60, 2), "load": round(load, 1)}


def score(model, test_list):
    """Scores in percent, with 95 % intervals, by the names of the columns."""
    found, _ = predict(Predictor(torch_detector(model, "fp32")), test_list, model.config.image_size, workers=1)
    metrics = compute_metrics(test_list, found)
    limits = intervals.intervals(test_list, intervals.match(test_list, rank(test_list, found)))
    row = {}
    for name in SCORES:
        row[name] = round(100 * metrics[name], 2)
        if limits.get(name):
            row[f"{name}_low"], row[f"{name}_high"] = (round(100 * limit, 2) for limit in limits[name])
    return row


if __name__ == "__main__":
    main()
