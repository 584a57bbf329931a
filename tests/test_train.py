"""Runs: from lists to files, stopped, killed, resumed, refused, broken in every way, and really learning."""

import csv
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_loss import COMBINATIONS
from torch.utils._python_dispatch import TorchDispatchMode

import train as train_module
from annotations import read_voc
from augment import NO_AUGMENTATION
from create_data_lists import create_data_lists
from data_list import DataList
from datasets import DetectionDataset, EpochSampler
from detector import torch_detector
from eval import Predictor, evaluate
from loss import MultiBoxLoss
from model import FPNSSD, ModelConfig, load_checkpoint, save_checkpoint
from recipe import PRESETS, TrainConfig, batch_sizes, make_config, scaled_lr
from run import Run, as_builtins, from_builtins, newest_checkpoint
from train import TrainingStopped, main, parse_args, train
from watch import StopOnSignal

ROOT = Path(__file__).parents[1]
TINY = ["trunk=test_resnet", "trunk_weights=none", "image_size=64", "fpn_channels=16", "batch_size=4", "eval_every=1"]
TINY += ["precision=fp32", "device=cpu", "warmup_steps=2", "workers=0", "nominal_batch=4"]
TIMING = ("seconds", "images_per_s", "share_waiting")


def tiny_config(drawn, **changes):
    config = make_config(parse_args(["--set", *TINY, f"data={drawn}", "name=tiny", "epochs=2"]))
    return replace(config, **changes)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same_end(one, other):
    """Whether two runs' checkpoints hold the same weights, averages, optimizers, scores and logs, bit for bit."""
    names = (one, other)
    one, other = (load_checkpoint(f"runs/{name}/last.pth.tar") for name in names)
    for key in ("raw_model", "optimizer", "ema_updates", "torch_rng"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    torch.testing.assert_close(one["model"].state_dict(), other["model"].state_dict(), rtol=0, atol=0)
    assert [one[key] for key in ("step", "best", "stale", "sums")] == [
        other[k] for k in ("step", "best", "stale", "sums")
    ]
    logs = [[{k: v for k, v in row.items() if k not in TIMING} for row in end["log"]] for end in (one, other)]
    assert logs[0] == logs[1]
    files = [list(csv.DictReader(Path(f"runs/{name}/log.csv").read_text().splitlines())) for name in names]
    files = [[{k: v for k, v in row.items() if v and k not in TIMING} for row in file] for file in files]
    assert files[0] == [{k: str(v) for k, v in row.items() if v is not None} for row in logs[0]]
    assert files[0] == files[1]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_command_line_over_preset():
    config = make_config(parse_args(["--preset", "lite", "--epochs", "3", "--set", "lr=1", "--set", "augment.flip=0"]))
    lite = PRESETS["lite"]()
    assert config == replace(lite, epochs=3, lr=1.0, augment=replace(lite.augment, flip=0.0))
    assert make_config(parse_args([])) == PRESETS["voc2012"]()
    assert make_config(parse_args(["--compile"])).compile


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset):
    config = make_config(parse_args(["--preset", preset]))
    assert config.name == preset
    assert from_builtins(TrainConfig, json.loads(json.dumps(as_builtins(config)))) == config
    FPNSSD(ModelConfig(("a",), config.trunk, config.image_size, config.fpn_channels))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "learning_rate=1"], "no field 'learning_rate'"),
        (["--set", "lr=fast"], "'fast' is no float"),
        (["--set", "frozen_stages=1.5"], r"'1\.5' is no int"),
        (["--epochs", "0"], "epochs is 0"),
        (["--set", "optimizer=lion"], "optimizer 'lion' is none of adamw, sgd"),
        (["--set", "class_loss=hinge"], "class_loss 'hinge' is none of ohem, focal, quality"),
        (["--name", "../x"], "plain folder name"),
        (["--data", "nowhere"], "no data list 'nowhere/train.json'"),
        (["--device", "tpu"], "'tpu' is not available here"),
        (["--precision", "int4"], "precision 'int4' is none of"),
    ],
)
def test_bad_command_lines_are_named(arguments, said, in_tmp):
    with pytest.raises(SystemExit, match=said):
        main(arguments)
    assert list(in_tmp.iterdir()) == []


def test_small_batches_are_accumulated_and_large_ones_scale_the_rate():
    assert batch_sizes(TrainConfig(batch_size=8, nominal_batch=32), 1000) == (8, 4)
    assert batch_sizes(TrainConfig(batch_size=12, nominal_batch=32), 1000) == (12, 3)
    assert batch_sizes(TrainConfig(batch_size=64, nominal_batch=32), 1000) == (64, 1)
    assert batch_sizes(TrainConfig(batch_size=8, nominal_batch=32), 20) == (8, 2)  # a tiny list has to fill a step
    assert batch_sizes(TrainConfig(batch_size=8, nominal_batch=32), 5) == (5, 1)
    assert scaled_lr(TrainConfig(lr=0.1, optimizer="sgd"), 128) == pytest.approx(0.4)
    assert scaled_lr(TrainConfig(lr=0.1, optimizer="adamw"), 128) == pytest.approx(0.2)
    assert scaled_lr(TrainConfig(lr=0.1), 20) == 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_from_lists_to_files(drawn, in_tmp, capsys):
    metrics = main(["--set", *TINY, f"data={drawn}", "name=a", "epochs=2"])
    printed = capsys.readouterr().out
    for field in fields(TrainConfig):
        assert f"{field.name} " in printed  # every knob is said
    assert "lr 0.001 (lr 0.001 is for 4)" in printed
    assert set(metrics["per_class"]) == set(DataList.load(drawn / "val.json").classes)
    last, best = (load_checkpoint(f"runs/a/{name}.pth.tar") for name in ("last", "best"))
    assert last["step"] == 6
    assert best["best"] == last["best"]
    assert "optimizer" not in best
    assert last["versions"]["torch"] == str(torch.__version__)
    assert json.loads(Path("runs/a/config.json").read_text())["fpn_channels"] == 16
    assert {path.name for path in Path("runs/a").iterdir() if "tfevents" not in path.name} == {
        "last.pth.tar", "previous.pth.tar", "best.pth.tar", "config.json", "log.csv", "curves.png",
        "batch_0.jpg", "batch_1.jpg", "batch_2.jpg", "val_001.jpg", "val_002.jpg",
    }  # fmt: skip
    rows = list(csv.DictReader(Path("runs/a/log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["voc2007_ap50"]) == pytest.approx(metrics["voc2007_ap50"])
    before = Path("runs/a/last.pth.tar").read_bytes()
    with pytest.raises(SystemExit, match="runs/a has a run already"):
        main(["--set", *TINY, f"data={drawn}", "name=a", "epochs=2"])
    assert Path("runs/a/last.pth.tar").read_bytes() == before


def test_accumulated_batches_are_one_batch(drawn, in_tmp):
    """The same images a step, normalised by the positives of all: the same weights but for the order of sums."""
    for name, batch_size in (("whole", 4), ("halves", 2)):
        train(tiny_config(drawn, name=name, batch_size=batch_size, optimizer="sgd", lr=0.01))
    whole, halves = (load_checkpoint(f"runs/{name}/last.pth.tar") for name in ("whole", "halves"))
    assert whole["step"] == halves["step"] == 6
    for name, tensor in whole["raw_model"].items():
        if tensor.is_floating_point():
            assert (tensor - halves["raw_model"][name]).norm() <= 1e-5 * tensor.norm(), name
    for one, other in zip(whole["log"], halves["log"], strict=True):
        assert one["loss_class"] == pytest.approx(other["loss_class"], rel=1e-5)


def test_early_stopping(drawn, in_tmp, capsys):
    train(tiny_config(drawn, epochs=30, patience=2, lr=0.0, log_every=1))  # nothing is learnt, so no score is better
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 9
    assert "stopped after 2 evaluations without a better one" in capsys.readouterr().out


def test_fine_tuning_from_other_classes(drawn, in_tmp, capsys):
    other = ModelConfig(("ring", "zebra"), "test_resnet", image_size=64, fpn_channels=16)
    save_checkpoint("other.pth.tar", FPNSSD(other))
    train(tiny_config(drawn, weights="other.pth.tar", epochs=1))
    said = capsys.readouterr().out
    assert "classes no longer asked for: zebra" in said
    assert re.search(r"new classes, learnt from scratch: circle, cross, square", said)
    train(tiny_config(drawn, weights="other.pth.tar", epochs=2), resume=True)  # the run's own weights, not these again
    assert "other.pth.tar: " not in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(drawn, in_tmp, precision):
    train(tiny_config(drawn, precision=precision, epochs=1))
    checkpoint = load_checkpoint("runs/tiny/last.pth.tar")
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["raw_model"].values())
    assert checkpoint["ema_updates"] > 0
    assert bool(checkpoint["scaler"]) == (precision == "fp16")
    train(tiny_config(drawn, precision=precision, epochs=2), resume=True)


@pytest.mark.long
def test_compiled_training_evaluates_and_resumes(drawn, in_tmp):
    train(tiny_config(drawn, epochs=2, name="eager"))
    train(tiny_config(drawn, epochs=1, name="compiled", compile=True))
    train(tiny_config(drawn, epochs=2, name="compiled", compile=True), resume=True)
    eager, compiled = (load_checkpoint(f"runs/{name}/last.pth.tar") for name in ("eager", "compiled"))
    assert set(eager["raw_model"]) == set(compiled["raw_model"])
    # Another schedule in the first epoch, so only that one's losses can be compared, and only roughly.
    assert compiled["log"][0]["loss_class"] == pytest.approx(eager["log"][0]["loss_class"], rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, killed and resumed


def test_resume_without_a_run_says_so(drawn, in_tmp):
    with pytest.raises(SystemExit, match="no checkpoint 'runs/tiny/last"):
        main(["--resume", "--set", *TINY, f"data={drawn}", "name=tiny", "epochs=2"])


@pytest.mark.parametrize(
    ("stop_after", "number"),
    [
        (3, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.long),
        pytest.param(4, signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_stopped_and_resumed_is_straight_through(drawn, in_tmp, monkeypatch, stop_after, number):
    straight = tiny_config(drawn, name="straight", batch_norm="train")
    train(straight)
    train_step = train_module.Training.train_step

    def interrupted(self, *arguments):
        if self.run.step + 1 == stop_after:
            os.kill(os.getpid(), number)
        return train_step(self, *arguments)

    monkeypatch.setattr(train_module.Training, "train_step", interrupted)
    config = replace(straight, name="stopped")
    train(config)
    assert load_checkpoint("runs/stopped/last.pth.tar")["step"] == stop_after
    monkeypatch.setattr(train_module.Training, "train_step", train_step)
    train(config, resume=True)
    same_end("straight", "stopped")
    assert load_checkpoint("runs/stopped/best.pth.tar")["step"] == load_checkpoint("runs/straight/best.pth.tar")["step"]


def start(folder, arguments, checkpoint=None):
    """Starts train.py as a user would, on one thread; returns the process once `checkpoint` is there."""
    code = f"import torch, sys; torch.set_num_threads(1); sys.path.insert(0, {str(ROOT)!r}); import train; train.main()"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while checkpoint and process.poll() is None and not (folder / checkpoint).exists():
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([(3, 0.3)], id="1"),
        pytest.param([(k % 4, 0.2 + 0.13 * k) for k in range(10)], id="10", marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed_is_straight_through(drawn, in_tmp, kills):
    """kill -9 at moments that fall anywhere, writing a checkpoint included; each time with other workers."""
    epochs = 3 * len(kills)
    arguments = ["--set", *TINY, f"data={drawn}", f"epochs={epochs}", f"eval_every={epochs}", "save_minutes=0.0"]
    said = start(in_tmp, [*arguments, "name=straight", "workers=1"]).communicate(timeout=300)[0]
    assert f"epoch {epochs}/{epochs}" in said
    for number, (workers, moment) in enumerate(kills):
        resume = ["--resume"] * (number > 0)
        process = start(in_tmp, [*arguments, "name=killed", f"workers={workers}", *resume], "runs/killed/last.pth.tar")
        if number:
            while "goes on with" not in process.stdout.readline():
                assert process.poll() is None
        time.sleep(moment)
        process.kill()
        process.communicate()
    start(in_tmp, [*arguments, "name=killed", "workers=1", "--resume"]).communicate(timeout=300)
    same_end("straight", "killed")


def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on(drawn, in_tmp):
    arguments = ["--set", *TINY, f"data={drawn}", "name=c", "epochs=300", "eval_every=300", "workers=1"]
    process = start(in_tmp, arguments, "runs/c/last.pth.tar")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loader's worker gets it too
    said = process.communicate(timeout=120)[0]
    assert "--name c --resume" in said
    assert "Traceback" not in said
    step = load_checkpoint("runs/c/last.pth.tar")["step"]
    assert 0 < step < 900
    process = start(in_tmp, ["--name", "c", "--resume", "--set", "save_minutes=0.001"])  # the run knows its recipe
    line = ""
    while f"runs/c/last.pth.tar, step {step}" not in line:
        line = process.stdout.readline()
        assert process.poll() is None
    while load_checkpoint("runs/c/last.pth.tar")["step"] == step:
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "--name c --resume" in said
    assert load_checkpoint("runs/c/last.pth.tar")["step"] > step


def test_a_signal_to_the_group_comes_with_the_end_of_a_worker(monkeypatch):
    """Both in one moment, as when a scheduler ends a job: nothing is printed of a signal that was lost."""
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    both = {signal.SIGTERM, signal.SIGCHLD}
    before = signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's loader has one
    try:
        with StopOnSignal() as stop:
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            for number in both:
                signal.pthread_kill(threading.get_ident(), number)  # no other thread is to take it now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        assert stop.wanted
        assert not lost
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_what_is_changed_is_said_and_what_cannot_is_refused(drawn, in_tmp, capsys):
    train(tiny_config(drawn, epochs=1))
    capsys.readouterr()
    metrics = main(["--resume", "--name", "tiny", "--epochs", "2", "--lr", "0.5", "--set", "eval_every=2"])
    said = capsys.readouterr().out
    assert "now epochs 1 -> 2" in said
    assert "now lr 0.001 -> 0.5" in said
    assert "eval_every 1 ->" not in said  # where it runs and when it looks may change without a word
    assert metrics is not None
    checkpoint = load_checkpoint("runs/tiny/last.pth.tar")
    assert checkpoint["optimizer"]["param_groups"][-1]["initial_lr"] == 0.5
    for changes, refused in (
        (["--seed", "1"], "seed 0 -> 1"),
        (["--set", "optimizer=sgd"], "optimizer 'adamw' -> 'sgd'"),
        (["--set", "fpn_channels=32"], "other classes or shapes"),
        (["--batch-size", "3"], "4 images a step .*, not 3"),
    ):
        with pytest.raises(SystemExit, match=refused):
            main(["--resume", "--name", "tiny", "--epochs", "3", *changes])
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 6
    # The same images a step in other pieces is the same run.
    main(["--resume", "--epochs", "3", "--batch-size", "2", "--set", "name=tiny"])
    # So are other rates and another precision: groups are the same whatever their values.
    capsys.readouterr()
    main(
        ["--resume", "--name", "tiny", "--epochs", "4", "--set", "trunk_lr_scale=1", "weight_decay=0", "precision=fp16"]
    )
    assert "now precision 'fp32' -> 'fp16'" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(drawn, in_tmp, capsys):
    config = tiny_config(drawn, name="a")
    train(config)
    shutil.copytree("runs/a", "runs/b")
    path = Path("runs/a/last.pth.tar")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, in the middle of some weight
    path.write_bytes(content)
    train(config, resume=True)
    captured = capsys.readouterr()
    assert "runs/a/last.pth.tar is passed over" in captured.err
    assert "goes on with runs/a/previous.pth.tar, step 6" in captured.out
    same_end("a", "b")
    whole = Path("runs/b/last.pth.tar").read_bytes()
    for place in (0, 20, len(whole) - 30, len(whole) - 2000, *range(len(whole) - 500, len(whole), 60)):
        broken = bytearray(whole)
        broken[place] ^= 0xFF  # in the zip file's own bookkeeping: its reader raises one thing or another, or nothing
        path.write_bytes(broken)
        assert newest_checkpoint(Path("runs/a"))[1]["step"] == 6
    for name in ("last", "previous"):
        Path(f"runs/a/{name}.pth.tar").write_bytes(content[:1000])
    with pytest.raises(SystemExit, match="no checkpoint in runs/a is whole; best"):
        main(["--resume", "--name", "a"])


def test_a_checkpoint_between_two_names_is_found(drawn, in_tmp, capsys):
    """A kill after last became previous, and before next became last."""
    config = tiny_config(drawn, name="a")
    train(config)
    Path("runs/a/last.pth.tar").rename("runs/a/next.pth.tar")
    train(replace(config, epochs=3), resume=True)
    assert "goes on with runs/a/next.pth.tar, step 6" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong, one by one: the message, and that nothing is lost


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_a_loss_that_is_not_finite(drawn, in_tmp, monkeypatch, batch_norm):
    """Step 4's loss is not a number; the host looks after step 5, and only step 4 has left no trace."""
    config = tiny_config(drawn, log_every=6, batch_norm=batch_norm)
    forward, calls = MultiBoxLoss.forward, []

    def broken(self, offsets, *arguments):
        calls.append(1)
        terms = forward(self, offsets, *arguments)
        return {**terms, "box": terms["box"] * math.nan} if len(calls) == 5 else terms

    states = {}
    train_step = train_module.Training.train_step

    def watched(self, *arguments):
        before = snapshot(self.run)
        result = train_step(self, *arguments)
        states[self.run.step] = before, snapshot(self.run)
        return result

    monkeypatch.setattr(MultiBoxLoss, "forward", broken)
    monkeypatch.setattr(train_module.Training, "train_step", watched)
    with pytest.raises(TrainingStopped, match=r"step 4: box nan, class \d.*on images \[\d+, \d+, \d+, \d+\]") as raised:
        train(config)
    torch.testing.assert_close(*states[4], rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*states[5], rtol=0, atol=0)
    checkpoint = load_checkpoint("runs/tiny/last.pth.tar")
    assert checkpoint["step"] == 6
    assert checkpoint["ema_updates"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["raw_model"].values())
    with Image.open("runs/tiny/not_finite_4_rank0.jpg") as picture:
        assert picture.width > 200
    ids = [int(text) for text in re.search(r"on images \[(.*?)\]", str(raised.value))[1].split(", ")]
    sampler = EpochSampler(12, seed=0)
    sampler.epoch = 1
    assert ids == [DataList.load(drawn / "train.json").image_id(key[1]) for key in list(sampler)[4:8]]
    monkeypatch.setattr(MultiBoxLoss, "forward", forward)
    train(replace(config, epochs=3), resume=True)
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 9


def snapshot(run):
    state = {**run.model.state_dict(), **{f"ema.{k}": v for k, v in run.ema.module.state_dict().items()}}
    state = {k: v for k, v in state.items() if "num_batches_tracked" not in k} | {"updates": run.ema.updates}
    moments = [v for one in run.optimizer.state.values() for v in one.values()]
    return {k: v.clone() for k, v in state.items()}, [v.clone() for v in moments]


def test_a_failure_of_the_evaluation_loses_no_epoch(drawn, in_tmp, monkeypatch):
    """A photograph that is missing there is found after the epoch: mended, the run ends as one that never failed."""
    shutil.copytree(drawn / "voc" / "JPEGImages", "photos")
    train(tiny_config(drawn, name="straight", images="photos"))
    Path("photos/val_00002.jpg").rename("elsewhere.jpg")
    with pytest.raises(TrainingStopped, match=r"val_00002\.jpg is missing.*Step 3 of runs/stopped is saved"):
        train(tiny_config(drawn, name="stopped", images="photos"))
    Path("elsewhere.jpg").rename("photos/val_00002.jpg")
    train(tiny_config(drawn, name="stopped", images="photos"), resume=True)
    same_end("straight", "stopped")


def test_out_of_gpu_memory(drawn, in_tmp, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(FPNSSD, "forward", full)
    with pytest.raises(TrainingStopped, match=r"batch of 4 images of 64 pixels.*--batch-size 2 .*Tried to allocate"):
        train(tiny_config(drawn))
    monkeypatch.undo()
    monkeypatch.chdir(in_tmp)
    train(tiny_config(drawn, batch_size=2), resume=True)  # as it said; there is a way back from the first step on
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 6


def test_a_full_disk_while_saving(drawn, in_tmp, monkeypatch, capsys):
    """Files may grow to a megabyte while the second epoch of three is saved: the first checkpoint stands."""
    save, seen = Run.save, []

    def limited(self):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        try:
            saved = save(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        seen.append((saved, load_checkpoint("runs/tiny/last.pth.tar")["step"]))
        return saved

    monkeypatch.setattr(Run, "save", limited)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train(tiny_config(drawn, epochs=3))
        # At the start; for each epoch before its evaluation and after it.
        assert seen == [(True, 0), (True, 3), (True, 3), (False, 3), (False, 3), (True, 9), (True, 9)]
        assert "step 6 could not be saved" in capsys.readouterr().err
        with pytest.raises(TrainingStopped, match="step 6 is not saved"):
            train(tiny_config(drawn, name="again"))  # it ends at step 6
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(Path("runs/tiny").glob(".*"))  # nothing half written is left behind


def test_a_full_disk_at_the_end_of_an_epoch(drawn, in_tmp, monkeypatch, capsys):
    """No byte can be written: not the log, the curves, the pictures, the best weights. Training goes on."""
    end_epoch = train_module.Training.end_epoch

    def full(self, *arguments):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if self.run.step == 3 else limits[0], limits[1]))
        try:
            end_epoch(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(train_module.Training, "end_epoch", full)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train(tiny_config(drawn))
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert "best.pth.tar could not be written" in capsys.readouterr().err
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 6
    assert len(Path("runs/tiny/log.csv").read_text().splitlines()) == 3
    assert Path("runs/tiny/curves.png").is_file()
    assert Path("runs/tiny/best.pth.tar").is_file()


@pytest.mark.parametrize(("box_loss", "class_loss", "matching"), COMBINATIONS)
def test_a_step_never_waits_for_the_device(drawn, in_tmp, box_loss, class_loss, matching):
    """What would make a GPU's host wait: numbers taken off it, choices by mask, and values copied onto it."""
    waits = {
        torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default,
        torch.ops.aten.masked_select.default, torch.ops.aten.lift_fresh.default, torch.ops.aten.bincount.default,
        torch.ops.aten.equal.default,
    }  # fmt: skip

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            assert function not in waits, function
            if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
                assert not any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in arguments[1]), function
            return function(*arguments, **(named or {}))

    config = tiny_config(drawn, box_loss=box_loss, class_loss=class_loss, matching=matching, batch_norm="train")
    training = train_module.Training(config, torch.device("cpu"), StopOnSignal(), resume=False)
    train_module.set_train_mode(training.run.model)
    batch = next(iter(training.loader))
    with Watched():
        training.train_step([batch], 1.0)
    with Watched(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        training.run.ema.updates.item()


def test_a_worker_that_is_killed(drawn, in_tmp, monkeypatch):
    getitem, parent = DetectionDataset.__getitem__, os.getpid()

    def fatal(self, key):
        if isinstance(key, tuple) and key[0] == 1 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return getitem(self, key)

    monkeypatch.setattr(DetectionDataset, "__getitem__", fatal)
    with pytest.raises(
        TrainingStopped,
        match=r"DataLoader worker \(pid.*fewer --workers.*(Step \d of runs/tiny is|stays as last) saved",
    ):
        train(tiny_config(drawn, workers=1))
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 3
    monkeypatch.setattr(DetectionDataset, "__getitem__", getitem)
    train(tiny_config(drawn, workers=1), resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photograph_that_went_missing(drawn, in_tmp, monkeypatch, workers):
    shutil.copytree(drawn / "voc" / "JPEGImages", "photos")
    end_epoch = train_module.Training.end_epoch

    def removed(self, *arguments):
        end_epoch(self, *arguments)
        Path("photos/train_00004.jpg").unlink(missing_ok=True)

    monkeypatch.setattr(train_module.Training, "end_epoch", removed)
    with pytest.raises(
        TrainingStopped, match=r"image photos/train_00004\.jpg is missing.*Step \d of runs/tiny is saved"
    ):
        train(tiny_config(drawn, images="photos", workers=workers, save_minutes=100.0))
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] >= 3


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
        PRESETS["lite"](), data=".", augment=NO_AUGMENTATION, epochs=60, eval_every=60, warmup_steps=10, ema_decay=0.95
    )
    train(config)
    model = load_checkpoint("runs/lite/last.pth.tar")["model"]
    metrics = evaluate(Predictor(torch_detector(model, "fp32")), DataList.load("train.json"))
    print(f"training AP50 {metrics['voc2007_ap50']:.3f}")
    assert metrics["voc2007_ap50"] >= 0.90
