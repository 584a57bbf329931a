"""The command line over a preset, and what of it is refused."""

import json
from dataclasses import replace

import pytest
import torch

import utils
from fpnssd.training.config import (
    PRESETS,
    TrainConfig,
    as_builtins,
    batch_sizes,
    from_builtins,
    make_config,
    scaled_lr,
)
from model import FPNSSD, ModelConfig
from train import main, parse_args
from utils import InputError, pick_precision


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
    with torch.device("meta"):
        FPNSSD(ModelConfig(("a",), config.backbone, config.image_size, config.fpn_channels))


def test_the_default_is_the_multibox_recipe():
    config = make_config(parse_args([]))
    assert (config.name, config.data, config.train_split, config.val_split) == (
        "voc2012",
        "data/voc2012",
        "train",
        "val",
    )
    assert (config.backbone, config.epochs, config.schedule, config.ema_decay) == ("resnet50", 280, "cosine", 0.999)
    assert (config.matching, config.box_loss, config.class_loss, config.box_weight) == (
        "multibox",
        "smooth_l1",
        "ohem",
        1,
    )
    assert (config.optimizer, config.lr, config.backbone_lr_scale) == ("adamw", 1e-3, 0.2)
    for name in ("voc2012", "voc0712"):
        multibox, atss = PRESETS[name](), PRESETS[f"{name}_atss"]()
        assert (multibox.matching, multibox.box_loss, multibox.class_loss) == ("multibox", "smooth_l1", "ohem")
        assert (atss.matching, atss.box_loss, atss.class_loss, atss.box_weight) == ("atss", "giou", "quality", 2)
        assert atss.data == multibox.data


def test_auto_precision(monkeypatch):
    """Training: fp32 on CPUs, bf16 where a GPU has it, else fp16 where it is fast. Elsewhere also bf16 on CPUs."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(utils, "has_fast_bf16", lambda device: True)
    assert [pick_precision("auto", device, training=True) for device in (cpu, gpu)] == ["fp32", "bf16"]
    assert pick_precision("auto", cpu) == "bf16"
    assert pick_precision("bf16", cpu, training=True) == "bf16"
    monkeypatch.setattr(utils, "has_fast_bf16", lambda device: False)
    fp16_of = {(6, 0): True, (7, 0): True, (7, 5): True, (6, 1): False, (5, 2): False}  # P100, V100, T4, GTX 1080, M40
    for capability, fast in fp16_of.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        assert pick_precision("auto", gpu, training=True) == ("fp16" if fast else "fp32")
        assert pick_precision("auto", gpu) == "fp32"


def test_a_configuration_is_checked_when_it_is_made():
    with pytest.raises(InputError, match="class_loss 'hinge' is not one of"):
        TrainConfig(class_loss="hinge")
    with pytest.raises(InputError, match="lr is nan"):
        replace(TrainConfig(), lr=float("nan"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "learning_rate=1"], "no field 'learning_rate'"),
        (["--set", "lr=fast"], "'fast' is not of type float"),
        (["--set", "frozen_stages=1.5"], r"'1\.5' is not of type int"),
        (["--epochs", "0"], "epochs is 0"),
        (["--lr", "0"], "lr is 0.0; it must be above 0"),
        (["--set", "clip_norm=0"], "clip_norm is 0.0; it must be above 0"),
        (["--set", "cache_side=-1"], "cache_side is -1"),
        (["--set", "milestones=(40, 50)"], r"milestones are \(40, 50\); they are shares"),
        (["--set", "optimizer=lion"], "optimizer 'lion' is not one of adamw, sgd"),
        (["--set", "class_loss=hinge"], "class_loss 'hinge' is not one of ohem, focal, quality"),
        (["--name", "../x"], "plain folder name"),
        (["--preset", "voc280"], "preset 'voc280' is called voc2012 now"),
        (
            ["--preset", "coco"],
            "preset 'coco' is not one of voc2012, voc2012_atss, voc0712, voc0712_atss, lite, finetune, demo",
        ),
        (["--trunk", "resnet18"], "--trunk is called --backbone now"),
        (["--trunk-weights=none"], "--trunk-weights is called --backbone-weights now"),
        (["--set", "trunk_lr_scale=0.1"], "trunk_lr_scale is called backbone_lr_scale now"),
        (["--set", "backbone_lr_decay=0.7"], "backbone_lr_decay was removed"),
        (["--set", "neck=ssd"], "neck was removed: the neck is always an FPN"),
        (["--set", "box_loss=ciou"], "'ciou' is not one of smooth_l1, giou: ciou was removed"),
        (["--set", "batch_norm=train"], "'train' is not one of frozen, sync: train was removed"),
        (["--set", "matching=ATSS"], "matching 'ATSS' is not one of multibox, atss"),
        (["--data", "nowhere"], "no data list 'nowhere/train.json'"),
        (["--device", "tpu"], "'tpu' is not available"),
        (["--precision", "int4"], "precision 'int4' is not one of"),
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


@pytest.mark.parametrize("text", ["scales=(0.1,0.2)", "scales=(0,1,1,1,1,1,1)", "milestones=('a',)"])
def test_numbers_of_a_list_are_checked(text):
    with pytest.raises(InputError, match=text.split("=")[0]):
        make_config(parse_args(["--set", text]))


def test_a_run_that_does_not_exist_is_named(in_tmp):
    with pytest.raises(InputError, match="there is no run runs/mien in "):
        make_config(parse_args(["--name", "mien", "--resume"]))


def test_fine_tuning_pastes_objects_to_the_end():
    assert (PRESETS["finetune"]().augment.close_epochs, PRESETS["lite"]().augment.close_epochs) == (0, 3)
