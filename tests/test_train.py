"""The schedule, what trains and what does not, and runs: stopped, resumed, refused, not finite, and really learning."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import train as train_module
from augment import NO_AUGMENTATION, AugmentConfig
from create_data_lists import create_data_lists, read_voc
from datasets import DataList
from eval import Predictor, evaluate
from loss import MultiBoxLoss
from model import FPNSSD, ModelConfig, load_checkpoint
from train import (
    PRESETS,
    TrainConfig,
    TrainingStopped,
    build_optimizer,
    freeze,
    lr_factor,
    main,
    make_config,
    parse_args,
    set_train_mode,
    train,
    trunk_stages,
)
from utils import InputError

ROOT = Path(__file__).parents[1]
TINY = ["trunk=resnet18", "trunk_weights=none", "image_size=64", "fpn_channels=16", "batch_size=4", "eval_every=1"]
TINY += ["precision=fp32", "device=cpu", "warmup_steps=2", "workers=0"]


def tiny_config(drawn, **changes):
    config = make_config(parse_args(["--set", *TINY, f"data={drawn}", "name=tiny", "epochs=2"]))
    return replace(config, **changes)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and schedule


def test_command_line_over_preset():
    config = make_config(parse_args(["--preset", "lite", "--epochs", "3", "--set", "lr=1", "--set", "augment.flip=0"]))
    assert config == replace(PRESETS["lite"], epochs=3, lr=1.0, augment=AugmentConfig(flip=0.0))
    assert make_config(parse_args([])) == TrainConfig()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "learning_rate=1"], "no field 'learning_rate'"),
        (["--set", "lr=fast"], "'fast' is no float"),
        (["--set", "frozen_stages=1.5"], r"'1\.5' is no int"),
        (["--epochs", "0"], "epochs is 0"),
        (["--set", "optimizer=lion"], "'lion' is neither adamw nor sgd"),
        (["--name", "../x"], "plain folder name"),
        (["--data", "nowhere"], "no data list 'nowhere/train.json'"),
        (["--device", "tpu"], "'tpu' is not available here"),
    ],
)
def test_bad_command_lines_are_named(arguments, said, in_tmp):
    with pytest.raises(SystemExit, match=said):
        main(arguments)
    assert list(in_tmp.iterdir()) == []


def test_learning_rate_by_hand():
    assert [lr_factor(step, 3, 103) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert lr_factor(53, 3, 103) == pytest.approx(0.5)
    assert lr_factor(28, 3, 103) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert lr_factor(103, 3, 103) == pytest.approx(0)


@pytest.mark.parametrize("trunk", ["resnet50", "tf_efficientnet_lite0"])
def test_frozen_stages_and_batch_norm_stay(trunk):
    config = TrainConfig(trunk=trunk, frozen_stages=2, lr=0.1, weight_decay=0.1, warmup_steps=0)
    model = FPNSSD(ModelConfig(classes=("a",), trunk=trunk, image_size=64, fpn_channels=16))
    freeze(model, config)
    before = {name: tensor.clone() for name, tensor in model.trunk.state_dict().items()}
    stages = trunk_stages(model.trunk)
    assert len(stages) == {"resnet50": 5, "tf_efficientnet_lite0": 8}[trunk]
    optimizer = build_optimizer(model, config)
    set_train_mode(model)
    offsets, logits = model(torch.randint(0, 256, (2, 3, 64, 64)))
    (offsets.square().mean() + logits.square().mean()).backward()
    optimizer.step()
    frozen = {id(p) for modules in stages[:3] for module in modules for p in module.parameters()}
    norms = {id(p) for m in model.trunk.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    moved = {id(p) for name, p in model.trunk.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {id(p) for p in model.trunk.parameters()} - frozen - norms
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.trunk.named_buffers())


def test_stages_that_are_not_known_are_not_guessed():
    model = FPNSSD(ModelConfig(classes=("a",), trunk="regnety_002", image_size=64, fpn_channels=16))
    with pytest.raises(InputError, match="frozen_stages=-1"):
        freeze(model, TrainConfig(trunk="regnety_002", frozen_stages=0))
    freeze(model, TrainConfig(trunk="regnety_002", frozen_stages=-1, freeze_bn=False))
    assert all(p.requires_grad for p in model.parameters())


def test_groups_of_the_optimizer():
    config = TrainConfig(trunk="resnet18", lr=0.1, trunk_lr_scale=0.2, weight_decay=0.3)
    model = FPNSSD(ModelConfig(classes=("a",), trunk="resnet18", image_size=64, fpn_channels=16))
    optimizer = build_optimizer(model, config)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert settings[id(model.trunk.layer1[0].conv1.weight)] == (pytest.approx(0.02), 0.3)
    assert settings[id(model.trunk.bn1.weight)] == (pytest.approx(0.02), 0)
    assert settings[id(model.box_heads[0].weight)] == (0.1, 0.3)
    assert settings[id(model.box_heads[0].bias)] == (0.1, 0)
    assert len(settings) == len(list(model.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_from_lists_to_files(drawn, in_tmp):
    metrics = main(["--set", *TINY, f"data={drawn}", "name=a", "epochs=2"])
    assert set(metrics["per_class"]) == set(DataList.load(drawn / "val.json").classes)
    last = load_checkpoint("runs/a/last.pth.tar")
    assert last["step"] == 6
    assert load_checkpoint("runs/a/best.pth.tar")["best"] == last["best"]
    assert json.loads(Path("runs/a/config.json").read_text())["fpn_channels"] == 16
    assert {path.name for path in Path("runs/a").iterdir()} == {
        "last.pth.tar", "best.pth.tar", "config.json", "log.csv", "curves.png",
        "batch_0.jpg", "batch_1.jpg", "batch_2.jpg",
    }  # fmt: skip
    rows = list(csv.DictReader(Path("runs/a/log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["voc2007_ap50"]) == pytest.approx(metrics["voc2007_ap50"])
    before = Path("runs/a/last.pth.tar").read_bytes()
    with pytest.raises(SystemExit, match="runs/a has a run already"):
        main(["--set", *TINY, f"data={drawn}", "name=a", "epochs=2"])
    with pytest.raises(SystemExit, match=r"another recipe.*lr 0\.001 -> 0\.5"):
        main(["--resume", "--name", "a", "--lr", "0.5"])
    assert Path("runs/a/last.pth.tar").read_bytes() == before


def test_resume_without_a_run_says_so(drawn, in_tmp):
    with pytest.raises(SystemExit, match="no checkpoint 'runs/tiny/last"):
        main(["--resume", "--set", *TINY, f"data={drawn}", "name=tiny", "epochs=2"])


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_stopped_and_resumed_is_straight_through(drawn, in_tmp, monkeypatch, stop_after):
    straight = tiny_config(drawn, name="straight")
    train(straight)
    wanted = load_checkpoint("runs/straight/last.pth.tar")
    train_step = train_module.train_step

    def interrupted(run, *arguments):
        if run.step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(run, *arguments)

    monkeypatch.setattr(train_module, "train_step", interrupted)
    config = replace(straight, name="stopped")
    train(config)
    assert load_checkpoint("runs/stopped/last.pth.tar")["step"] == stop_after
    monkeypatch.setattr(train_module, "train_step", train_step)
    train(config, resume=True)
    found = load_checkpoint("runs/stopped/last.pth.tar")
    assert found["step"] == wanted["step"] == 6
    for key in ("raw_model", "optimizer"):
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=0)
    torch.testing.assert_close(found["model"].state_dict(), wanted["model"].state_dict(), rtol=0, atol=0)
    assert found["best"] == wanted["best"]
    timing = ("seconds", "images_per_s", "loss_box", "loss_class")  # a split epoch's means are of its second part
    logs = [[{k: v for k, v in row.items() if k not in timing} for row in c["log"]] for c in (found, wanted)]
    assert logs[0] == logs[1]
    assert load_checkpoint("runs/stopped/best.pth.tar")["step"] == load_checkpoint("runs/straight/best.pth.tar")["step"]


def start_and_interrupt(folder, arguments, moment, wanted_signal, checkpoint=None):
    """Starts train.py as a user would, signals it `moment` seconds after its first line, returns its output.

    With `checkpoint` the time counts from when that file exists: on a busy machine an epoch may take long.
    """
    code = f"import torch, sys; torch.set_num_threads(1); sys.path.insert(0, {str(ROOT)!r}); import train; train.main()"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = process.stdout.readline()
    while checkpoint and process.poll() is None and not (folder / checkpoint).exists():
        time.sleep(0.02)
    time.sleep(moment)
    process.send_signal(wanted_signal)
    return first + process.communicate(timeout=120)[0]


def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on(drawn, in_tmp):
    arguments = ["--set", *TINY, f"data={drawn}", "name=c", "epochs=300", "eval_every=300", "workers=1"]
    said = start_and_interrupt(in_tmp, arguments, 3, signal.SIGINT)
    assert "--name c --resume" in said
    assert "Traceback" not in said
    step = load_checkpoint("runs/c/last.pth.tar")["step"]
    assert 0 < step < 900
    said = start_and_interrupt(in_tmp, ["--name", "c", "--resume"], 3, signal.SIGINT)  # the run knows its recipe
    assert f"resumed after step {step}" in said
    assert load_checkpoint("runs/c/last.pth.tar")["step"] > step


@pytest.mark.long
def test_killed_at_any_moment_the_checkpoint_is_whole(drawn, in_tmp):
    arguments = ["--set", *TINY, f"data={drawn}", "name=k", "epochs=1000", "eval_every=1000"]
    steps = [0]
    for kill in range(10):
        resume = ["--resume"] * (kill > 0)
        start_and_interrupt(in_tmp, arguments + resume, 1 + 0.37 * kill, signal.SIGKILL, "runs/k/last.pth.tar")
        steps.append(load_checkpoint("runs/k/last.pth.tar")["step"])
    assert steps == sorted(steps)
    assert steps[-1] > steps[1] > 0


def test_a_loss_that_is_not_finite_stops_the_run(drawn, in_tmp, monkeypatch):
    config = tiny_config(drawn)
    forward = MultiBoxLoss.forward
    calls = []

    def broken(self, *arguments):
        calls.append(1)
        terms = forward(self, *arguments)
        return {**terms, "box": terms["box"] * math.nan} if len(calls) == 5 else terms

    monkeypatch.setattr(MultiBoxLoss, "forward", broken)
    with pytest.raises(TrainingStopped, match=r"step 4: box nan, class \d.*on images \[\d+, \d+, \d+, \d+\]"):
        train(config)
    checkpoint = load_checkpoint("runs/tiny/last.pth.tar")  # the end of epoch 1
    assert checkpoint["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["raw_model"].values())


def test_train_and_val_of_other_classes(drawn, in_tmp):
    content = json.loads((drawn / "val.json").read_text())
    content["categories"][0]["name"] = "blob"
    for split, text in (("val", json.dumps(content)), ("train", (drawn / "train.json").read_text())):
        Path(f"{split}.json").write_text(text)
    with pytest.raises(SystemExit, match="evaluate on a list made with the same classes"):
        main(["--set", *TINY, "data=.", "name=a"])


@pytest.mark.long
def test_it_learns_32_photographs_by_heart(voc_real, in_tmp):
    create_data_lists([read_voc([voc_real], "train")], in_tmp)
    content = json.loads(Path("train.json").read_text())
    content["images"] = content["images"][:32]
    chosen = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in chosen]
    for split in ("train", "val"):
        Path(f"{split}.json").write_text(json.dumps(content))
    config = replace(
        PRESETS["lite"], data=".", augment=NO_AUGMENTATION, epochs=60, eval_every=60, warmup_steps=10, ema_decay=0.95
    )
    train(config)
    model = load_checkpoint("runs/lite/last.pth.tar")["model"]
    metrics = evaluate(Predictor(model, torch.device("cpu"), "fp32"), DataList.load("train.json"))
    print(f"training AP50 {metrics['voc2007_ap50']:.3f}")
    assert metrics["voc2007_ap50"] >= 0.90
