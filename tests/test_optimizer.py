"""What is trained, learning rates, the averaged weights, and fine-tuning from a detector of other classes."""

import math

import pytest
import torch
from torch import nn

from fpnssd.training.config import TrainConfig
from fpnssd.training.optim import (
    EMA,
    backbone_stages,
    build_optimizer,
    freeze,
    load_weights,
    lr_factor,
    set_train_mode,
    synchronise_batch_norm,
)
from model import FPNSSD, ModelConfig
from utils import InputError


def tiny_model(classes=("a",), **changes):
    return FPNSSD(ModelConfig(classes, **{"backbone": "resnet18", "image_size": 64, "fpn_channels": 16, **changes}))


def test_learning_rate_by_hand():
    config = TrainConfig(warmup_steps=3)
    assert [lr_factor(step, config, 103) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert lr_factor(53, config, 103) == pytest.approx(0.5)
    assert lr_factor(28, config, 103) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert lr_factor(103, config, 103) == pytest.approx(0)
    short = TrainConfig(warmup_steps=100)
    assert [lr_factor(step, short, 12) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert lr_factor(11, short, 12) < 0.05
    steps = TrainConfig(warmup_steps=2, schedule="steps", milestones=(0.5, 0.75))
    factors = [lr_factor(step, steps, 8) for step in range(8)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("backbone", ["resnet50", "tf_efficientnet_lite0"])
def test_frozen_stages_and_batch_norm_stay(backbone):
    config = TrainConfig(backbone=backbone, frozen_stages=2, lr=0.1, weight_decay=0.1, warmup_steps=0)
    model = FPNSSD(ModelConfig(classes=("a",), backbone=backbone, image_size=64, fpn_channels=16))
    freeze(model, config)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    stages = backbone_stages(model.backbone)
    assert len(stages) == {"resnet50": 5, "tf_efficientnet_lite0": 8}[backbone]
    optimizer = build_optimizer(model, config, config.lr)
    set_train_mode(model)
    offsets, logits = model(torch.randint(0, 256, (2, 3, 64, 64)))
    (offsets.square().mean() + logits.square().mean()).backward()
    optimizer.step()
    frozen = {id(p) for modules in stages[:3] for module in modules for p in module.parameters()}
    norms = {id(p) for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    moved = {id(p) for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {id(p) for p in model.backbone.parameters()} - frozen - norms
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.backbone.named_buffers())


def test_stages_that_are_not_known_are_not_guessed():
    model = FPNSSD(ModelConfig(classes=("a",), backbone="regnety_002", image_size=64, fpn_channels=16))
    with pytest.raises(InputError, match="frozen_stages=-1"):
        freeze(model, TrainConfig(backbone="regnety_002", frozen_stages=0))
    freeze(model, TrainConfig(backbone="regnety_002", frozen_stages=-1, batch_norm="sync"))
    assert all(p.requires_grad for p in model.parameters())


def test_groups_of_the_optimizer():
    config = TrainConfig(backbone="resnet18", lr=0.1, backbone_lr_scale=0.2, weight_decay=0.3)
    model = FPNSSD(ModelConfig(classes=("a",), backbone="resnet18", image_size=64, fpn_channels=16))
    optimizer = build_optimizer(model, config, config.lr)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert settings[id(model.backbone.layer1[0].conv1.weight)] == (pytest.approx(0.02), 0.3)
    assert settings[id(model.backbone.bn1.weight)] == (pytest.approx(0.02), 0)
    assert settings[id(model.box_heads[0].weight)] == (0.1, 0.3)
    assert settings[id(model.box_heads[0].bias)] == (0.1, 0)
    assert len(settings) == len(list(model.parameters()))


def test_ema_by_hand():
    model = tiny_model()
    ema = EMA(model, decay=0.5)
    weight, start = model.box_heads[0].bias, model.box_heads[0].bias.detach().clone()
    nn.init.constant_(weight, 1.0)
    ema.update(model, 0)  # decay 1/10: nearly all of it is new
    first = 0.1 * start + 0.9
    torch.testing.assert_close(ema.module.box_heads[0].bias, first)
    nn.init.constant_(weight, 5.0)
    ema.update(model, 1)  # decay 2/11
    torch.testing.assert_close(ema.module.box_heads[0].bias, 2 / 11 * first + 9 / 11 * 5.0)
    ema.update(model, 1000)  # from now on 0.5
    torch.testing.assert_close(ema.module.box_heads[0].bias, 0.5 * (2 / 11 * first + 9 / 11 * 5.0) + 2.5)
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert not ema.module.training


def test_ema_averages_statistics_and_copies_counters():
    model = tiny_model()
    ema = EMA(model, decay=0.5)
    norm, average = model.backbone.bn1, ema.module.backbone.bn1
    norm.running_mean.fill_(4.0)
    norm.num_batches_tracked.fill_(7)
    ema.update(model, 1000)
    assert torch.equal(average.running_mean, torch.full_like(average.running_mean, 2.0))
    assert average.num_batches_tracked == 7


def test_batch_norm_over_processes_keeps_its_tensors():
    for backbone in ("resnet18", "tf_efficientnet_lite0"):
        model = tiny_model(backbone=backbone)
        before = model.state_dict()
        synchronise_batch_norm(model)
        assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        assert {k: v.data_ptr() for k, v in model.state_dict().items()} == {k: v.data_ptr() for k, v in before.items()}


def test_classes_are_carried_over_by_name():
    old, new = tiny_model(("cat", "dog", "cow")), tiny_model(("dog", "zebra", "cat"))
    for parameter in old.parameters():
        nn.init.normal_(parameter)
    fresh = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    said = load_weights(new, old)
    assert "zebra" in said
    assert "cow" in said
    for name, tensor in new.state_dict().items():
        if not name.startswith("class_heads."):
            assert torch.equal(tensor, old.state_dict()[name])
    for head, of_old in zip(new.class_heads, old.class_heads, strict=True):
        ours, theirs = head.bias.view(-1, 4), of_old.bias.view(-1, 4)
        assert torch.equal(ours[:, [0, 1, 3]], theirs[:, [0, 2, 1]])  # background, dog, cat
        ours, theirs = head.weight.view(-1, 4, 16, 3, 3), of_old.weight.view(-1, 4, 16, 3, 3)
        assert torch.equal(ours[:, [0, 1, 3]], theirs[:, [0, 2, 1]])
    assert torch.equal(new.class_heads[0].bias.view(-1, 4)[:, 2], fresh["class_heads.0.bias"].view(-1, 4)[:, 2])


def test_another_backbone_is_left_as_it_is():
    old, new = tiny_model(), tiny_model(backbone="tf_efficientnet_lite0")
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    for parameter in old.parameters():
        nn.init.constant_(parameter, 2.0)
    said = load_weights(new, old)
    assert "not copied, missing or of another shape: pixel_mean, pixel_std, backbone." in said
    for name, tensor in new.state_dict().items():
        if name.startswith(("backbone.", "pixel_")):  # its pixel statistics belong to the backbone
            assert torch.equal(tensor, before[name])
    assert torch.equal(new.box_heads[0].weight, old.box_heads[0].weight)


def test_what_does_not_fit_is_said():
    new = tiny_model(fpn_channels=32)
    said = load_weights(new, tiny_model())
    assert "not copied, missing or of another shape: fpn." in said
    assert all(torch.isfinite(tensor).all() for tensor in new.state_dict().values())
