"""What the finetune preset chooses from lists, and trainings with it and with a limit of minutes."""

import csv
import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import TINY, tiny_config

import train as train_module
from fpnssd.data.data_list import DataList
from fpnssd.training import finetune
from fpnssd.training.config import TrainConfig, make_config
from fpnssd.training.pictures import draw_detections, missed_objects
from fpnssd.training.time_plan import TimePlan
from model import FPNSSD, ModelConfig, load_checkpoint, save_checkpoint
from train import main, parse_args, train
from utils import InputError, fast_products, has_fast_bf16


@pytest.fixture
def checkpoint(in_tmp):
    """A tiny detector of other classes to start from."""
    config = ModelConfig(("circle", "zebra"), "test_resnet", image_size=64, fpn_channels=16)
    save_checkpoint("start.pth.tar", FPNSSD(config))
    return "start.pth.tar"


def write_list(folder, sides, labels=None, size=100, split="train"):
    """A data list of one image for each object: a square of this side in an image of `size` pixels."""
    labels = labels or [1] * len(sides)
    images = [{"id": n, "file_name": f"{n}.jpg", "width": size, "height": size} for n, _ in enumerate(sides)]
    objects = [
        {"id": n, "image_id": n, "category_id": label, "bbox": [10, 10, side, side], "area": side * side, "iscrowd": 0}
        for n, (side, label) in enumerate(zip(sides, labels, strict=True))
    ]
    categories = [{"id": label, "name": f"c{label}"} for label in sorted(set(labels))]
    content = {"info": {"image_root": "."}, "images": images, "annotations": objects, "categories": categories}
    Path(folder).mkdir(exist_ok=True)
    Path(folder, f"{split}.json").write_text(json.dumps(content))


def chosen(*arguments):
    """{field: value} that the preset chooses, and the configuration in the end."""
    args = parse_args(["--preset", "finetune", *arguments])
    choices = finetune.choose(partial(make_config, args))
    return {c.field: c.value for c in choices}, make_config(args, [c.assignment for c in choices])


def test_choices_by_hand(checkpoint):
    write_list("data", [30] * 30 + [50] * 10, [1] * 30 + [2] * 10)
    values, config = chosen("--data", "data", "--weights", checkpoint)
    assert (config.backbone, config.image_size, config.fpn_channels) == ("test_resnet", 64, 16)
    assert config.val_split == ""  # there is no val.json
    assert config.repeats == 8  # 8 x 40 = 320
    assert config.epochs == 30  # of 9,600
    assert config.class_balance == 0.5  # three times as many photographs
    assert "scales" in values
    assert config.scales == TrainConfig().scales  # the checkpoint's
    assert "image_size" in values


def test_minutes_take_as_many_epochs_as_fit(checkpoint):
    write_list("data", [30] * 400)
    write_list("data", [30] * 2, split="val")
    _, config = chosen("--data", "data", "--weights", checkpoint, "--minutes", "5")
    assert config.epochs == config.eval_every == finetune.MANY_EPOCHS
    assert (config.minutes, config.repeats, config.val_split, config.class_balance) == (5, 1, "val", 0)


def test_the_command_line_goes_before_all_choices(checkpoint):
    write_list("data", [4] * 40)
    _, config = chosen("--data", "data", "--weights", checkpoint)
    assert config.scales == finetune.SMALLER_SCALES
    given = ["--epochs", "3", "--set", "class_balance=1", "image_size=128", f"scales={TrainConfig().scales}"]
    values, config = chosen("--data", "data", "--weights", checkpoint, *given)
    assert (config.epochs, config.class_balance, config.image_size) == (3, 1.0, 128)
    assert config.scales == TrainConfig().scales
    assert config.eval_every == 1  # four evaluations of three epochs do not fit
    _, config = chosen("--data", "data", "--weights", checkpoint, "--set", "repeats=1")
    assert (config.repeats, config.epochs, config.eval_every) == (1, 240, 60)  # 9,600 samples all the same
    printed = finetune.format_choices([finetune.Choice("epochs", 30, "why")], replace(config, epochs=3))
    assert printed == "epochs  3  given, instead of 30"


def test_objects_without_a_prior_and_tiny_ones(in_tmp):
    """At 300 px and 38 cells a cell is 7.9 px and the smallest prior a square of 30 px around the cell's centre."""
    centre = 150 + 3.947  # of a cell: 19.5 / 38 of the side
    boxes = np.array([[centre - s, centre - s, centre + s, centre + s] for s in (11, 10)], np.float32) / 300
    config = make_config(parse_args(["--preset", "lite"]))
    assert finetune.share_matched(boxes, config) == 0.5  # 22^2 / 30^2 = 0.54, 20^2 / 30^2 = 0.44
    write_list("data", [12, 12, 40, 40], size=300)
    data_list = DataList.load("data/train.json")
    assert finetune.normalised_boxes(data_list)[0] == pytest.approx([10 / 300, 10 / 300, 22 / 300, 22 / 300])
    (choice,) = finetune.choose_image_size(data_list, config)
    assert (choice.field, choice.value) == ("image_size", 384)
    assert choice.reason == "50% of the objects are under 16 px at 300; a step takes 1.6 x"
    write_list("data", [12, 40, 40, 40], size=300)
    assert finetune.choose_image_size(DataList.load("data/train.json"), config) == []


def test_other_priors_than_ssds_are_refused(in_tmp):
    shapes = list(ModelConfig(("a",)).prior_shapes)
    shapes[3] = tuple(reversed(shapes[3]))
    save_checkpoint("odd.pth.tar", FPNSSD(ModelConfig(("a",), "test_resnet", 64, 16, prior_shapes=tuple(shapes))))
    write_list("data", [30] * 20)
    with pytest.raises(InputError, match="odd.pth.tar does not have SSD's priors"):
        chosen("--data", "data", "--weights", "odd.pth.tar")


def test_fine_tuning_without_a_val_list(drawn, checkpoint, training_pictures, capsys):
    shutil.copy(drawn / "train.json", "train.json")
    tiny = [text for text in TINY if text.split("=")[0] not in ("backbone", "image_size", "fpn_channels")]
    flags = ["--preset", "finetune", "--data", ".", "--weights", checkpoint, "--name", "mine", "--epochs", "1"]
    assert main([*flags, "--set", *tiny, "repeats=2"]) is None
    printed = capsys.readouterr().out
    assert "no list val.json" in printed
    assert "given, instead of 400" in printed  # 9,600 samples in epochs of 2 x 12
    assert "detect.py FOLDER --checkpoint runs/mine/last.pth.tar" in printed
    last = load_checkpoint("runs/mine/last.pth.tar")
    assert last["step"] == 6  # 12 images, twice, by 4
    assert not Path("runs/mine/best.pth.tar").exists()
    assert Path("runs/mine/curves.png").exists()
    main(["--name", "mine", "--resume", "--epochs", "2"])
    assert load_checkpoint("runs/mine/last.pth.tar")["step"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# --minutes


class StepClock:
    """A clock in which each training step takes `seconds` and all else nothing."""

    def __init__(self, monkeypatch, seconds):
        self.now, train_step = 0.0, train_module.Trainer.train_step

        def slow(trainer, *arguments):
            self.now += seconds
            return train_step(trainer, *arguments)

        monkeypatch.setattr(train_module.Trainer, "train_step", slow)
        monkeypatch.setattr(train_module, "TimePlan", partial(TimePlan, clock=lambda: self.now))


def test_minutes_end_a_training_within_an_epoch(drawn, in_tmp, training_pictures, monkeypatch, capsys):
    """Steps of 10 s, three in an epoch. Of 180.5 s the end takes 3 + (40 + 6 / 2) * 10 / 4: no eighth step fits."""
    StepClock(monkeypatch, 10.0)
    metrics = train(tiny_config(drawn, minutes=180.5 / 60, epochs=1000, eval_every=1000), started=0.0)
    last = load_checkpoint("runs/tiny/last.pth.tar")
    assert last["step"] == 7
    assert last["elapsed"] == 70
    assert metrics is not None
    rows = list(csv.DictReader(Path("runs/tiny/log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["3", "6", "7"]
    assert rows[0]["voc2007_ap50"] == "" != rows[2]["voc2007_ap50"]
    assert float(rows[2]["lr"]) < 0.1 * float(rows[0]["lr"])
    assert Path("runs/tiny/best.pth.tar").exists()
    assert Path("runs/tiny/val.jpg").exists()
    said = capsys.readouterr().out
    assert "3.00833 minutes, epochs of 3 steps" in said
    assert (" --min-score " in said) == (last["log"][2]["best_min_score"] is not None)
    train(tiny_config(drawn, minutes=180.5 / 60, epochs=1000, eval_every=1000), resume=True, started=70.0)
    assert "nothing left to do" in capsys.readouterr().out
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 7
    train(tiny_config(drawn, minutes=361 / 60, epochs=1000, eval_every=1000), resume=True, started=70.0)
    last = load_checkpoint("runs/tiny/last.pth.tar")
    assert (last["step"], last["elapsed"]) == (25, 250)
    assert [row["step"] for row in last["log"]] == [3, 6, 7, 9, 12, 15, 18, 21, 24, 25]
    assert last["log"][2]["voc2007_ap50"] is not None


def test_a_limit_that_ends_with_an_epoch_is_over_too(drawn, in_tmp, monkeypatch, capsys):
    """Six steps of 10 s, so two epochs: 171 s less 3 + (40 + 6 / 2) * 10 / 4 leave 60.5."""
    StepClock(monkeypatch, 10.0)
    for started in (0.0, 60.0):
        train(tiny_config(drawn, minutes=171 / 60, epochs=1000, eval_every=1000), resume=started > 0, started=started)
        assert [row["step"] for row in load_checkpoint("runs/tiny/last.pth.tar")["log"]] == [3, 6]
    assert "the 2.85 minutes of runs/tiny are over" in capsys.readouterr().out
    last = load_checkpoint("runs/tiny/last.pth.tar")
    del last["ended_minutes"], last["elapsed"], last["format_version"]  # the first two: as in files of earlier versions
    save_checkpoint("runs/tiny/last.pth.tar", last.pop("model"), **last)
    train(tiny_config(drawn, epochs=3), resume=True)
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 9


def test_a_resumed_training_keeps_to_what_is_left(drawn, in_tmp, monkeypatch):
    clock = StepClock(monkeypatch, 10.0)
    train(tiny_config(drawn, minutes=6.0, epochs=1), started=0.0)
    assert load_checkpoint("runs/tiny/last.pth.tar")["elapsed"] == 30
    clock.now = 10_000.0  # the time between the two processes does not count
    train(tiny_config(drawn, minutes=6.0, epochs=1000), resume=True, started=9_990.0)
    # 360 s less 3 + 43 * 2.5 for the end leave 249.5; 40 have passed.
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 3 + 20
    assert load_checkpoint("runs/tiny/last.pth.tar")["elapsed"] == 240


@pytest.mark.long
def test_minutes_of_the_wall_clock(drawn, in_tmp):
    started = time.monotonic()
    train(tiny_config(drawn, minutes=0.5, epochs=100_000, eval_every=100_000, log_every=5), started=started)
    assert 0.6 * 30 <= time.monotonic() - started <= 1.1 * 30


# ---------------------------------------------------------------------------------------------------------------------
# Its end, and its arithmetic


def test_missed_objects_by_hand(in_tmp):
    write_list("data", [20, 40], [1, 2])
    data_list = DataList.load("data/train.json")
    near, far = torch.tensor([[10.0, 10, 29, 30]]), torch.tensor([[20.0, 20, 40, 40]])
    assert missed_objects(data_list, 0, near, torch.tensor([1])).tolist() == []
    assert missed_objects(data_list, 0, near, torch.tensor([2])).tolist() == [[10, 10, 30, 30]]  # another class
    assert missed_objects(data_list, 0, far, torch.tensor([1])).tolist() == [[10, 10, 30, 30]]  # IoU 1 / 7
    assert missed_objects(data_list, 1, torch.zeros(0, 4), torch.zeros(0)).tolist() == [[10, 10, 50, 50]]


def test_missed_objects_are_white_in_the_contact_sheet(in_tmp):
    write_list("data", [40, 40, 40])
    for number in range(3):
        Image.new("RGB", (100, 100), (90, 90, 90)).save(f"data/{number}.jpg")
    data_list = DataList.load("data/train.json")
    found = {"boxes": torch.tensor([[10.0, 10, 50, 50]]), "scores": torch.tensor([0.6]), "labels": torch.tensor([1])}
    sheet = draw_detections(data_list, [found] * 3, min_score=0.5, count=3, side=100)
    assert sheet.size == (200, 200)
    assert sheet.getpixel((10, 30)) != (255, 255, 255)
    sheet = draw_detections(data_list, [found] * 3, min_score=0.7, count=3, side=100)
    assert sheet.getpixel((10, 30)) == (255, 255, 255)
    assert sheet.getpixel((110, 30)) == (255, 255, 255)


@pytest.mark.skipif(not has_fast_bf16(torch.device("cpu")), reason="this processor has no bf16 instructions")
@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "conv"), reason="this torch cannot be told so")
def test_fast_products_round_to_bf16_and_end():
    torch.manual_seed(0)
    image, weights = torch.randn(1, 64, 20, 20), torch.randn(64, 64, 3, 3)
    plain = torch.nn.functional.conv2d(image, weights)
    with fast_products(torch.device("cpu"), enabled=False):
        assert torch.equal(torch.nn.functional.conv2d(image, weights), plain)
    with fast_products(torch.device("cpu")):
        fast = torch.nn.functional.conv2d(image, weights)
    rounded = torch.nn.functional.conv2d(image.bfloat16().double(), weights.bfloat16().double())
    torch.testing.assert_close(fast.double(), rounded, rtol=0, atol=1e-3)  # products of bf16, sums of fp32
    assert (fast - plain).abs().max() > 0.01
    assert torch.equal(torch.nn.functional.conv2d(image, weights), plain)
