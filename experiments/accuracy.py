"""Compares recipes on VOCreal: named variants of the lite preset, trained and scored alike.

    python -m experiments.accuracy screen base giou atss                  # 12 epochs, seed 0, on the screening split
    python -m experiments.accuracy screen copy_paste+giou                 # two changes together
    python -m experiments.accuracy confirm base atss --seeds 0 1 2        # 24 epochs, on val
    python -m experiments.accuracy large base+lite2                       # 4 epochs, on 400 of train_large
    python -m experiments.accuracy screen torchvision_fcos+half_lr        # another detector, trained alike (peers.py)
    python -m experiments.accuracy table screen                           # differences to base, with paired intervals
    python -m experiments.accuracy table screen --seeds 0                 # the runs of one seed alone

`screen` takes 200 of the training list's VOC2012 photographs out of it to score on, always the same ones. `large` takes
400 of all sources out of the list train_large. Only `confirm` reads val, once a run, after the last epoch. Each run is
kept in runs/accuracy_STAGE_VARIANT_SEED_EPOCHS_HASH and resumed if it was stopped. A finished one becomes a row of the
results and is not run again; `--results mine.csv` starts with no rows. A difference whose interval holds 0 is called
noise. Intervals are of the photographs alone: another seed moves AP50 as well. A revision with a plus had uncommitted
changes; a run that was resumed at another revision names both.
"""

import argparse
import ast
import csv
import fcntl
import hashlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from experiments.peers import PEERS, train_peer
from experiments.screening import screening_ids
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.evaluation import intervals
from fpnssd.evaluation.metrics import compute_metrics, rank
from fpnssd.evaluation.predict import Predictor, predict
from fpnssd.evaluation.result_files import read_coco, write_coco
from fpnssd.inference.detector import torch_detector
from fpnssd.training.checkpoints import LAST
from fpnssd.training.config import TrainConfig, as_builtins, lite, set_fields
from fpnssd.training.cpu_memory import keep_freed_memory
from fpnssd.training.setup import load_lists
from model import load_checkpoint
from train import train
from utils import (
    InputError,
    atomic_write,
    error_message,
    hash_file,
    pick_device,
    pick_precision,
    write_text,
)

# Changes of this table that the lite preset has by now: variants start without them.
TAKEN_BACK = [
    "backbone=tf_efficientnet_lite0", "matching=multibox", "box_loss=smooth_l1", "box_weight=1.0", "class_loss=ohem",
    "augment.copy_paste=0.0", "augment.close_epochs=10", "class_balance=0.0",
]  # fmt: skip
VARIANTS = {
    "base": [],
    "thaw": ["frozen_stages=1"],
    "thaw_c3": ["frozen_stages=2", "backbone_lr_scale=0.5"],
    "freeze_more": ["frozen_stages=4"],
    "slow_backbone": ["backbone_lr_scale=0.1"],
    "fast_backbone": ["backbone_lr_scale=0.5"],
    "small_batch": ["batch_size=8", "nominal_batch=8", "lr=0.0007"],
    "half_lr": ["lr=0.0005"],
    "quarter_lr": ["lr=0.00025"],
    "double_lr": ["lr=0.002"],
    "more_decay": ["weight_decay=0.05"],
    "retinanet_rates": [
        "lr=0.0001",
        "backbone_lr_scale=1.0",
        "weight_decay=0.05",
    ],  # torchvision's, of its second version
    "giou": ["box_loss=giou", "box_weight=2.0"],
    "atss": ["matching=atss", "box_loss=giou", "box_weight=2.0"],
    "focal": ["class_loss=focal"],
    "atss_quality": ["matching=atss", "class_loss=quality", "box_loss=giou", "box_weight=2.0"],
    "weaker_colour": ["augment.colour=0.25"],
    "less_zoom_out": ["augment.zoom_out=0.25", "augment.zoom_out_max=2.0"],
    "no_tiny": ["augment.min_side=8.0"],
    "mosaic": ["augment.mosaic=0.5", "augment.close_epochs=3"],
    "copy_paste": ["augment.copy_paste=0.5", "augment.close_epochs=3"],
    "balance": ["class_balance=0.5"],
    "smaller_priors": ["scales=(0.06, 0.14, 0.28, 0.44, 0.6, 0.76, 0.9)"],
    "narrow_fpn": ["fpn_channels=64"],
    "wide_fpn": ["fpn_channels=192"],
    "lite1": ["backbone=tf_efficientnet_lite1"],
    "lite2": ["backbone=tf_efficientnet_lite2"],
}
GONE = {"train_batch_norm": ["batch_norm=train"], "no_way_down": ["neck=ssd"]}  # options that rows of the table had
SHARED_WITH_PEERS = (
    "batch_size", "nominal_batch", "lr", "backbone_lr_scale", "weight_decay", "frozen_stages", "backbone",
    "fpn_channels",
)  # fmt: skip
EPOCHS = {"screen": 12, "confirm": 24, "large": 4}
SCREENING_IMAGES = 200
LARGE_IMAGES, LARGE_OBJECTS = 400, 15  # taken out of train_large, and least of each class among them
RESAMPLES = 4_000  # of a comparison; with 1,000 the ends of intervals move by a tenth of a point
RESULTS = "experiments/accuracy.csv"
DEFAULTS = Path(__file__).with_name("accuracy_defaults.json")
SCORES = (
    "voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50", "coco_ap75", "coco_ap_small", "coco_ap_medium",
    "coco_ap_large",
)  # fmt: skip

COLUMNS = (
    "variant", "changes", "epochs", "seeds", "VOC2007 AP50", "COCO AP", "S / M / L", "minutes", "VOC2007 AP50 gained",
    "COCO AP gained",
)  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=(*EPOCHS, "table"))
    parser.add_argument("names", nargs="*", metavar="VARIANT", help=f"of {', '.join((*VARIANTS, *PEERS))}")
    parser.add_argument("--data", default="data/vocreal", help="folder of the data lists train and val, or train_large")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 if not named; of table: all that there are")
    parser.add_argument("--epochs", type=int, help=f"instead of {EPOCHS}")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help=f"instead of {RESULTS}")
    parser.add_argument("--against", default="base", help="of table: the variant that others are compared with")
    args = parser.parse_args(argv)
    try:
        if args.what == "table":
            for stage in args.names or EPOCHS:
                print_table(stage, args)
            return
        folder = lists_of(args.what, Path(args.data))
        for seed in args.seeds or [0]:
            for name in args.names:
                run_variant(args.what, name, seed, folder, args.epochs or EPOCHS[args.what], args.results)
    except (InputError, OSError) as error:
        sys.exit(f"accuracy: {error_message(error)}")


# ---------------------------------------------------------------------------------------------------------------------
# Which photographs


def lists_of(stage, data):
    """Folder with the lists train and val of a stage; DataError if train, screening and val share a photograph."""
    if stage == "large":
        return large_lists(data)
    paths = {name: data / f"{name}.json" for name in ("train", "val")}
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"no data list {str(path)!r}: python create_data_lists.py creates one")
    parts = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    # VOC2012's photographs are called by their year, VOC2007's and COCO's are not.
    of_voc2012 = [i["id"] for i in parts["train"]["images"] if re.match(r"20\d\d_", i["file_name"])]
    if len(of_voc2012) < SCREENING_IMAGES:
        raise DataError(
            f"{data / 'train.json'} has {len(of_voc2012)} photographs named as VOC2012's are (2010_000001.jpg); "
            f"{SCREENING_IMAGES} are taken out to screen on"
        )
    taken = set(random.Random(0).sample(sorted(of_voc2012), SCREENING_IMAGES))
    splits = {
        "train": chosen(parts["train"], lambda image_id: image_id not in taken),
        "screening": chosen(parts["train"], lambda image_id: image_id in taken),
        "val": parts["val"],
    }
    check_apart(splits, data)
    if stage == "confirm":
        return data
    return write_lists(data.with_name(f"{data.name}_screen"), splits["train"], splits["screening"])


def large_lists(data):
    """Folder with the list train_large less the photographs taken out of it, as train, and those as val."""
    path = data / "train_large.json"
    if not path.is_file():
        raise DataError(f"no data list {str(path)!r}: python create_data_lists.py creates one")
    content = json.loads(path.read_text(encoding="utf-8"))
    taken = screening_ids(content, LARGE_IMAGES, LARGE_OBJECTS)
    train_part = chosen(content, lambda image_id: image_id not in taken)
    screening = chosen(content, lambda image_id: image_id in taken)
    check_apart({"train": train_part, "screening": screening}, data)
    return write_lists(data.with_name(f"{data.name}_screen_large"), train_part, screening)


def write_lists(folder, train_part, val_part):
    """The folder, with both as data lists; files that hold them already are left alone."""
    for name, part in (("train", train_part), ("val", val_part)):
        content = json.dumps(part)
        path = folder / f"{name}.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            write_text(path, content)
    return folder


def chosen(content, wanted):
    """A data list's JSON with the images whose id is wanted, and their objects."""
    images = [one for one in content["images"] if wanted(one["id"])]
    objects = [one for one in content["annotations"] if wanted(one["image_id"])]
    return {**content, "images": images, "annotations": objects}


def check_apart(splits, data):
    """DataError if the same bytes are in two of the lists."""
    seen = {}
    for name, content in splits.items():
        for image in content["images"]:
            path = data / content["info"]["image_root"] / image["file_name"]
            before, other = seen.setdefault(hash_file(path), (name, path))
            if before != name:
                raise DataError(f"{path} of {name} is {other} of {before}: the lists must not share photographs")


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run_variant(stage, name, seed, folder, epochs, results):
    """Trains a variant or resumes it, scores its last epoch and adds the row; does nothing where the row is there."""
    check_name(name)
    config = variant_config(name, stage, seed, folder, epochs)
    digest = config_hash(config, name)
    key = {"stage": stage, "variant": name, "seed": str(seed), "epochs": str(epochs)}
    if any(has_key(row, key) and row["config_hash"] == digest for row in read_results(results)):
        print(f"{config.name} is in {results} already; --results FILE keeps others")
        return
    config = replace(config, name=f"{config.name}_{digest}")  # a run of another recipe is not resumed
    run_folder = Path("runs") / config.name
    begun = run_folder / "revision"
    run_folder.mkdir(parents=True, exist_ok=True)
    revisions = begun.read_text().split() if begun.is_file() else []
    begun.write_text(" ".join(dict.fromkeys([*revisions, revision()])))
    train_list, val_list = load_lists(config)
    if peer_of(name):
        with keep_freed_memory(torch.device("cpu")):  # as train.py does for ours; peers know no other device
            predict_fn, minutes = train_peer(peer_of(name), config, train_list, run_folder)
    else:
        predict_fn, minutes = train_ours(config, run_folder)
    found, _ = predict(predict_fn, val_list, config.image_size)
    write_coco(run_folder / "detections.json", val_list, found)
    metrics = compute_metrics(val_list, found)
    limits = intervals.intervals(val_list, intervals.match(val_list, rank(val_list, found)))
    row = {
        "run": config.name, **key, "images": len(train_list), "git": begun.read_text(), "config_hash": digest,
        "hardware": hardware(), "minutes": round(minutes, 1), "date": str(date.today()), "torch": torch.__version__,
        "precision": "fp32" if peer_of(name) else pick_precision(config.precision, pick_device(config.device)),
    }  # fmt: skip
    for score in SCORES:
        row[score] = "" if metrics[score] is None else round(100 * metrics[score], 2)
        if limits.get(score):
            row[f"{score}_low"], row[f"{score}_high"] = (round(100 * limit, 2) for limit in limits[score])
    add_row(results, row, key)
    print(", ".join(f"{key} {value}" for key, value in row.items()))


def check_name(name):
    """InputError for unknown names, and for a variant that changes what a peer has of its own."""
    variants = name.split("+")[1 if peer_of(name) else 0 :]
    if not set(variants) <= set(VARIANTS):
        raise InputError(f"no variant {name!r}: there is {', '.join((*VARIANTS, *PEERS))}")
    own = sorted({change.split("=")[0] for change in changes_of(name)} - set(SHARED_WITH_PEERS))
    if peer_of(name) and own:
        raise InputError(f"{name}: peers have their own {', '.join(own)}; shared is {', '.join(SHARED_WITH_PEERS)}")


def peer_of(name):
    """The peer that a name begins with, or None."""
    first = name.split("+")[0]
    return first if first in PEERS else None


def has_key(row, key):
    return all(row[name] == value for name, value in key.items())


def variant_config(name, stage, seed, folder, epochs):
    """The TrainConfig of a run: the plain recipe with what the variant changes; of peers, what they share with it."""
    crowds = ["difficult_positive=False"] if stage == "large" else []  # COCO's are marked as difficult there
    return replace(
        set_fields(lite(), [*TAKEN_BACK, *crowds, *changes_of(name)]), data=str(folder), cache="disk", seed=seed,
        tf32=False, epochs=epochs, eval_every=epochs, name=f"accuracy_{stage}_{name}_{seed}_{epochs}",
    )  # fmt: skip


def changes_of(name):
    """The settings of a variant, or of several joined by a plus; a peer has none."""
    return [change for part in name.split("+") for change in (VARIANTS | GONE).get(part, [])]


def train_ours(config, folder):
    """(predict_fn of the last epoch's averaged weights, minutes of training)"""
    train(config, resume=(folder / LAST).exists())
    checkpoint = load_checkpoint(folder / LAST)
    if len(checkpoint["log"]) < config.epochs:
        sys.exit(f"accuracy: {config.name} was stopped; the same command resumes it")
    minutes = sum(one["seconds"] for one in checkpoint["log"]) / 60
    return Predictor(torch_detector(checkpoint["model"])), minutes


def config_hash(config, variant):
    """Eight digits of a hash of all fields that decide a run's result.

    Only fields that differ from the defaults of the day of the first row, kept in a file, are hashed: a default that
    changes later changes hashes as any other value does, and a new field with its default value changes none.
    """
    unimportant = {"name": "", "cache": "off", "workers": 0, "save_minutes": 0.0, "log_every": 1, "tf32": True}
    defaults = as_builtins(TrainConfig()) | json.loads(DEFAULTS.read_text(encoding="utf-8"))
    values = {k: v for k, v in as_builtins(replace(config, **unimportant)).items() if v != defaults[k]}
    if peer_of(variant):
        code = ast.unparse(ast.parse(Path(__file__).with_name("peers.py").read_text(encoding="utf-8")))  # no comments
        values["peers.py"] = hashlib.sha256(code.encode()).hexdigest()
    values = {name.replace("backbone", "trunk"): value for name, value in values.items()}  # as in the first rows
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def revision():
    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS}")  # rows are no code
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpu_info.read_text()) if cpu_info.is_file() else None
    return f"{named[1] if named else platform.machine()}, {os.cpu_count()} cores"


def read_results(results):
    if not results.is_file():
        return []
    with open(results, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_row(results, row, key):
    """Adds a row to the results, or replaces the one of the same key; several processes may do so at once."""
    results.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(results.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # of the folder, as the file itself is replaced
        rows = [*(one for one in read_results(results) if not has_key(one, key)), row]
        with atomic_write(results) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    finally:
        os.close(folder)  # which unlocks


# ---------------------------------------------------------------------------------------------------------------------
# The table


def print_table(stage, args):
    """A line for each variant and number of epochs: means over its seeds, and differences to the variant --against."""
    groups = {}
    for row in read_results(args.results):
        if row["stage"] == stage and (not args.seeds or int(row["seed"]) in args.seeds):
            groups.setdefault((int(row["epochs"]), row["variant"]), {})[int(row["seed"])] = row
    print(f"\n{stage}: means over seeds, 95 % intervals; differences to {args.against} paired by seed and image")
    print("|", " | ".join(COLUMNS), "|")
    print("|" + "---|" * len(COLUMNS))
    for (epochs, variant), seeds in sorted(groups.items()):
        against = groups.get((epochs, args.against), {})
        cells = [
            variant, " ".join(changes_of(variant)),
            epochs, len(seeds),
            score_cell(seeds, "voc2007_ap50"), score_cell(seeds, "coco_ap"),
            " / ".join(mean_cell(seeds, f"coco_ap_{size}") for size in ("small", "medium", "large")),
            mean_cell(seeds, "minutes"),
            *(("", "") if variant == args.against else differences(stage, against, seeds, args)),
        ]  # fmt: skip
        print("|", " | ".join(map(str, cells)), "|")


def mean_cell(seeds, name):
    """The mean of a column over seeds; a dash where there is no value."""
    values = [float(row[name]) for row in seeds.values() if row[name] != ""]
    return f"{statistics.mean(values):.1f}" if values else "-"


def score_cell(seeds, name):
    """The mean of a score and of its interval's ends; with several seeds also the lowest and the highest."""
    values = [float(row[name]) for row in seeds.values() if row[name] != ""]
    spread = f", seeds {min(values):.1f} .. {max(values):.1f}" if len(values) > 1 else ""
    return f"{mean_cell(seeds, name)} ({mean_cell(seeds, f'{name}_low')} .. {mean_cell(seeds, f'{name}_high')}{spread})"


def differences(stage, base, other, args):
    """Paired differences in VOC2007 AP50 and COCO AP of two groups of runs, over the seeds that both have."""
    shared = sorted(base.keys() & other.keys())
    data_list = DataList.load(lists_of(stage, Path(args.data)) / "val.json")
    seeds, matched = [], ([], [])
    for seed in shared:
        files = [Path("runs") / group[seed]["run"] / "detections.json" for group in (base, other)]
        if all(file.is_file() for file in files):
            seeds.append(seed)
            for file, side in zip(files, matched, strict=True):
                side.append(intervals.match(data_list, rank(data_list, read_coco(file, data_list)[0])))
    if not seeds:
        return ("detections of these runs are not here" if shared else "no seed in common",) * 2
    compared = intervals.compare(data_list, *matched, samples=RESAMPLES)
    return [difference_cell(compared[score], seeds) for score in ("voc2007_ap50", "coco_ap")]


def difference_cell(compared, seeds):
    low, high = (100 * end for end in compared["interval"])
    verdict = "better" if low > 0 else "worse" if high < 0 else "noise"
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{100 * compared['difference']:+.1f} ({low:+.1f} .. {high:+.1f}): {verdict} ({which})"


if __name__ == "__main__":
    main()
