"""What can go wrong in a training, one by one: the message, and that nothing is lost."""

import math
import os
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import same_end, tiny_config

import train as train_module
from datasets import DetectionDataset, EpochSampler
from fpnssd.data.data_list import DataList
from fpnssd.training.checkpoints import Run
from fpnssd.training.loss import MultiBoxLoss
from model import FPNSSD, load_checkpoint
from train import TrainingStopped, train


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
    sampler.set_epoch(1)
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


def test_a_worker_that_is_killed(drawn, in_tmp, monkeypatch):
    getitem, parent = DetectionDataset.__getitem__, os.getpid()

    def fatal(self, key):
        if isinstance(key, tuple) and key[0] == 1 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return getitem(self, key)

    monkeypatch.setattr(DetectionDataset, "__getitem__", fatal)
    with pytest.raises(
        TrainingStopped,
        match=r"worker that loads data was lost.*fewer --workers.*(Step \d of runs/tiny is|stays as last) saved",
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
