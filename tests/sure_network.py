"""A small network that finds something in noise, for tests of everything around a network."""

import torch

from model import FPNSSD, ModelConfig, save_checkpoint


def save_sure_network(path, classes=("cat", "dog"), backbone="test_resnet", image_size=64, level=1):
    """Writes a checkpoint of random weights whose class scores are high on one level of the pyramid; returns path."""
    torch.manual_seed(0)
    model = FPNSSD(ModelConfig(classes, backbone, image_size=image_size, fpn_channels=16))
    torch.nn.init.normal_(model.class_heads[level].weight, std=0.5)
    save_checkpoint(path, model)
    return path
