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
from fpnssd.training.checkpoints import MAX_SKIPPED, NotFiniteError, RunFolder, TrainState
from fpnssd.training.loss import MultiBoxLoss
from model import FPNSSD, load_checkpoint
from train import TrainingStopped, train


def test_a_loss_that_is_not_finite(drawn, in_tmp, monkeypatch):
    """Step 4's loss is not a number; the loss is read after step 5, and nothing is saved since the first epoch."""
    config = tiny_config(drawn, log_every=6)
    forward, calls = MultiBoxLoss.forward, []

    def broken(self, offsets, *arguments):
        calls.append(1)
        terms = forward(self, offsets, *arguments)
        return {**terms, "box": terms["box"] * math.nan} if len(calls) == 5 else terms

    monkeypatch.setattr(MultiBoxLoss, "forward", broken)
    stopped = r"step 4: box nan, class \d.*on images \[\d+, \d+, \d+, \d+\].*runs/tiny stays as last saved"
    with pytest.raises(TrainingStopped, match=stopped) as raised:
        train(config)
    checkpoint = load_checkpoint("runs/tiny/last.pth.tar")
    assert checkpoint["step"] == 3
    for weights in (checkpoint["raw_model"], checkpoint["model"].state_dict()):
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    with Image.open("runs/tiny/not_finite_4_rank0.jpg") as picture:
        assert picture.width > 200
    ids = [int(text) for text in re.search(r"on images \[(.*?)\]", str(raised.value))[1].split(", ")]
    sampler = EpochSampler(12, seed=0)
    sampler.set_epoch(1)
    assert ids == [DataList.load(drawn / "train.json").image_id(key[1]) for key in list(sampler)[4:8]]
    monkeypatch.setattr(MultiBoxLoss, "forward", forward)
    train(replace(config, epochs=3), resume=True)
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 9


@pytest.mark.parametrize("due", ["loss", "weight"])
def test_what_is_not_finite_is_never_saved(drawn, in_tmp, monkeypatch, due):
    """A checkpoint that is due right after a bad step: the loss is read before it, and the weights are looked at."""
    train_step = train_module.Trainer.train_step

    def broken(self, batches):
        losses = train_step(self, batches)
        if self.state.step == 1 and due == "loss":
            losses[0] = math.inf
        if self.state.step == 1 and due == "weight":
            self.state.model.box_heads[0].bias.data[3] = math.nan
        return losses

    monkeypatch.setattr(train_module.Trainer, "train_step", broken)
    said = {"loss": "step 1: box inf", "weight": r"step 2: box_heads\.0\.bias nan"}[due]
    with pytest.raises(TrainingStopped, match=f"not finite at {said}.*stays as last saved"):
        train(tiny_config(drawn, save_minutes=0.0))
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 1


def test_infinite_gradients_of_fp16_are_skipped_but_not_for_ever(drawn, in_tmp):
    state = TrainState(None, None, None, torch.amp.GradScaler("cpu"))
    skipped, good = torch.tensor([1.0, 2.0, math.inf]), torch.tensor([1.0, 2.0, 3.0])
    for losses in [*[skipped] * (MAX_SKIPPED - 1), good]:
        state.unread.append((0, [], losses))
    state.read_losses()
    assert state.means() == {"box": 1.0, "class": 2.0}
    assert state.sums["steps"] == 1
    for _ in range(MAX_SKIPPED):
        state.unread.append((0, [], skipped))
    with pytest.raises(NotFiniteError, match="gradient norm inf"):
        state.read_losses()
    in_fp32 = TrainState(None, None, None, torch.amp.GradScaler("cpu", enabled=False))
    in_fp32.unread.append((0, [], skipped))
    with pytest.raises(NotFiniteError, match="gradient norm inf"):
        in_fp32.read_losses()


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
    save, seen = RunFolder.save, []

    def limited(self, state):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if state.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        try:
            saved = save(self, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        seen.append((saved, load_checkpoint("runs/tiny/last.pth.tar")["step"]))
        return saved

    monkeypatch.setattr(RunFolder, "save", limited)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train(tiny_config(drawn, epochs=3))
        # At the start; for each epoch before its evaluation and after it.
        assert seen == [(True, 0), (True, 3), (True, 3), (False, 3), (False, 3), (True, 9), (True, 9)]
        assert "step 6 of runs/tiny could not be saved" in capsys.readouterr().err
        with pytest.raises(TrainingStopped, match="step 6 is not saved"):
            train(tiny_config(drawn, name="again"))  # it ends at step 6
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in Path("runs/tiny").glob(".*")] == [".lock"]  # nothing half written is left behind


def test_a_full_disk_at_the_end_of_an_epoch(drawn, in_tmp, training_pictures, monkeypatch, capsys):
    """No byte can be written: not the log, the curves, the pictures, the best weights. Training goes on."""
    end_epoch = train_module.Trainer.end_epoch

    def full(self, *arguments):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if self.state.step == 3 else limits[0], limits[1]))
        try:
            end_epoch(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(train_module.Trainer, "end_epoch", full)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train(tiny_config(drawn))
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert "best.pth.tar could not be saved" in capsys.readouterr().err
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
        match=r"data loading worker died.*fewer --workers.*(Step \d of runs/tiny is|stays as last) saved",
    ):
        train(tiny_config(drawn, workers=1))
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 3
    monkeypatch.setattr(DetectionDataset, "__getitem__", getitem)
    train(tiny_config(drawn, workers=1), resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photograph_that_went_missing(drawn, in_tmp, monkeypatch, workers):
    shutil.copytree(drawn / "voc" / "JPEGImages", "photos")
    end_epoch = train_module.Trainer.end_epoch

    def removed(self, *arguments):
        end_epoch(self, *arguments)
        Path("photos/train_00004.jpg").unlink(missing_ok=True)

    monkeypatch.setattr(train_module.Trainer, "end_epoch", removed)
    with pytest.raises(
        TrainingStopped, match=r"image photos/train_00004\.jpg is missing.*Step \d of runs/tiny is saved"
    ):
        train(tiny_config(drawn, images="photos", workers=workers, save_minutes=100.0))
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] >= 3
