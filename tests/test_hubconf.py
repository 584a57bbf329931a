"""torch.hub loads a detector from anywhere."""

from pathlib import Path

import torch

from model import FPNSSD, ModelConfig, save_checkpoint

ROOT = str(Path(__file__).parents[1])


def test_hub_loads_from_another_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "small.pth.tar", FPNSSD(ModelConfig(("a",), "resnet18", image_size=64, fpn_channels=16)))
    monkeypatch.chdir(tmp_path)
    assert torch.hub.load(ROOT, "model", source="local", checkpoint="small.pth.tar").config.classes == ("a",)
    detector = torch.hub.load(ROOT, "detector", source="local", checkpoint="small.pth.tar", runtime="torch")
    assert detector.predict(torch.zeros(3, 9, 9)).size == (9, 9)
