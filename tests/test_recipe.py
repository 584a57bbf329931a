"""The command line over a preset, and what of it is refused."""

import json
from dataclasses import replace

import pytest

from fpnssd.training.checkpoints import as_builtins, from_builtins
from fpnssd.training.config import PRESETS, TrainConfig, batch_sizes, make_config, scaled_lr
from model import FPNSSD, ModelConfig
from train import main, parse_args


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
    FPNSSD(ModelConfig(("a",), config.backbone, config.image_size, config.fpn_channels))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "learning_rate=1"], "no field 'learning_rate'"),
        (["--set", "lr=fast"], "'fast' is no float"),
        (["--set", "frozen_stages=1.5"], r"'1\.5' is no int"),
        (["--epochs", "0"], "epochs is 0"),
        (["--lr", "0"], "lr is 0.0; it must be above 0"),
        (["--set", "clip_norm=0"], "clip_norm is 0.0; it must be above 0"),
        (["--set", "cache_side=-1"], "cache_side is -1"),
        (["--set", "milestones=(40, 50)"], r"milestones are \(40, 50\); they are shares"),
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
