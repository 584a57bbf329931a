"""Runs: from lists to files, in other pieces and precisions, from other weights, and really learning."""

import csv
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loss import COMBINATIONS
from tiny_training import TINY, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

import train as train_module
from create_data_lists import create_data_lists
from fpnssd.data.augment import NO_AUGMENTATION
from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.data.voc import read_voc
from fpnssd.evaluation.predict import Predictor, evaluate
from fpnssd.inference.detector import torch_detector
from fpnssd.training.config import PRESETS
from fpnssd.training.failures import StopOnSignal
from fpnssd.training.setup import load_lists, make_train_loader
from model import FPNSSD, ModelConfig, load_checkpoint, save_checkpoint
from train import main, train


def test_a_run_from_lists_to_files(drawn, in_tmp, training_pictures, capsys):
    metrics = main(["--set", *TINY, f"data={drawn}", "name=a", "epochs=2"])
    printed = capsys.readouterr().out
    for changed in ("epochs 2", "name a", f"data {drawn}", "image_size 64", "all fields: runs/a/config.json"):
        assert changed in printed
    assert "ema_decay" not in printed  # a field of the preset's own value
    assert "accumulated), lr 0.001\n" in printed
    assert "best: runs/a/best.pth.tar (epoch " in printed
    assert f"python eval.py runs/a/best.pth.tar --data {drawn}" in printed
    assert set(metrics["per_class"]) == set(DataList.load(drawn / "val.json").classes)
    last, best = (load_checkpoint(f"runs/a/{name}.pth.tar") for name in ("last", "best"))
    assert last["step"] == 6
    assert best["best"] == last["best"]
    assert "optimizer" not in best
    assert last["versions"]["torch"] == str(torch.__version__)
    assert json.loads(Path("runs/a/config.json").read_text())["fpn_channels"] == 16
    assert {path.name for path in Path("runs/a").iterdir() if "tfevents" not in path.name} == {
        "last.pth.tar", "best.pth.tar", "config.json", "log.csv", "curves.png", "batch_0.jpg", "batch_1.jpg",
        "batch_2.jpg", "val_001.jpg", "val_002.jpg", "val.jpg", ".lock",
    }  # fmt: skip
    rows = list(csv.DictReader(Path("runs/a/log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["voc2007_ap50"]) == pytest.approx(metrics["voc2007_ap50"])
    before = Path("runs/a/last.pth.tar").read_bytes()
    with pytest.raises(SystemExit, match="runs/a has a run already"):
        main(["--set", *TINY, f"data={drawn}", "name=a", "epochs=2"])
    assert Path("runs/a/last.pth.tar").read_bytes() == before


def test_a_folder_that_holds_no_checkpoint_is_no_run(drawn, in_tmp):
    """As one that was killed before its first: neither train nor --resume would take the name."""
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/config.json").write_text("{}")
    train(tiny_config(drawn, epochs=1))
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 3


def test_best_of_a_list_without_objects_is_the_latest(drawn, in_tmp):
    shutil.copytree(drawn, "data")
    content = json.loads(Path("data/val.json").read_text())
    Path("data/val.json").write_text(json.dumps({**content, "annotations": []}))
    train(tiny_config("data", patience=1))
    assert load_checkpoint("runs/tiny/best.pth.tar")["step"] == 6


def test_an_epoch_takes_as_long_as_all_its_parts(drawn, in_tmp, monkeypatch):
    train_step, take = train_module.Trainer.train_step, 1.0

    def slow(self, *arguments):
        time.sleep(take)
        self.stop.requested = self.state.step == 1
        return train_step(self, *arguments)

    monkeypatch.setattr(train_module.Trainer, "train_step", slow)
    train(tiny_config(drawn, epochs=1))
    take = 0.0
    train(tiny_config(drawn, epochs=1), resume=True)
    (row,) = load_checkpoint("runs/tiny/last.pth.tar")["log"]
    assert row["step"] == 3
    assert row["seconds"] > 2


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
    train(tiny_config(drawn, epochs=30, patience=2, lr=1e-30, log_every=1))  # nothing is learnt, so no score is better
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 9
    assert "stopped after 2 evaluations without improvement" in capsys.readouterr().out


def test_fine_tuning_from_other_classes(drawn, in_tmp, capsys):
    other = ModelConfig(("ring", "zebra"), "test_resnet", image_size=64, fpn_channels=16)
    save_checkpoint("other.pth.tar", FPNSSD(other))
    train(tiny_config(drawn, weights="other.pth.tar", epochs=1))
    said = capsys.readouterr().out
    assert "classes that are dropped: zebra" in said
    assert re.search(r"classes with new weights: circle, cross, square", said)
    train(tiny_config(drawn, weights="other.pth.tar", epochs=2), resume=True)  # the run's own weights, not these again
    assert "other.pth.tar: " not in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(drawn, in_tmp, precision):
    train(tiny_config(drawn, precision=precision, epochs=1))
    checkpoint = load_checkpoint("runs/tiny/last.pth.tar")
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["raw_model"].values())
    assert any((checkpoint["model"].state_dict()[k] != v).any() for k, v in checkpoint["raw_model"].items())
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

    config = tiny_config(drawn, box_loss=box_loss, class_loss=class_loss, matching=matching)
    Path("runs/tiny").mkdir(parents=True)
    trainer = train_module.Trainer(config, load_lists(config), torch.device("cpu"), StopOnSignal())
    state = trainer.state
    train_module.set_train_mode(state.model)
    batch = next(iter(trainer.loader))
    with Watched():
        state.unread.append((0, batch["key"], trainer.train_step([batch])))
        state.ema.update(state.model, state.step)
    with Watched(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        state.unread[0][2].sum().item()


def test_train_and_val_of_other_classes(drawn, in_tmp):
    content = json.loads((drawn / "val.json").read_text())
    content["categories"][0]["name"] = "blob"
    for split, text in (("val", json.dumps(content)), ("train", (drawn / "train.json").read_text())):
        Path(f"{split}.json").write_text(text)
    with pytest.raises(SystemExit, match="use a list made with the same classes"):
        main(["--set", *TINY, "data=.", "name=a"])


@pytest.mark.parametrize("crowds", [False, True])
def test_a_training_list_without_objects_is_refused(drawn, in_tmp, crowds):
    shutil.copytree(drawn, "data")
    content = json.loads(Path("data/train.json").read_text())
    entries = [{**entry, "iscrowd": 1} for entry in content["annotations"]] if crowds else []
    Path("data/train.json").write_text(json.dumps({**content, "annotations": entries}))
    with pytest.raises(DataError, match=r"train\.json has no objects to train on"):
        load_lists(tiny_config("data"))


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


def test_difficult_objects_that_are_ignored_are_crowds_to_the_augmentation(drawn):
    data_list = DataList.load(drawn / "train.json")
    data_list.difficult[:] = True
    for positive in (True, False):
        loader = make_train_loader(tiny_config(drawn, difficult_positive=positive), data_list, 4, 12, False)
        batch = next(iter(loader))
        assert (batch["crowd"] == ((batch["labels"] > 0) & (not positive))).all()
    assert not data_list.crowd.any()
