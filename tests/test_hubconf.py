"""torch.hub loads a detector from anywhere."""

import subprocess
import sys
from pathlib import Path

import torch

from model import FPNSSD, ModelConfig, save_checkpoint

CODE = """
import torch
def load(entry):
    return torch.hub.load({root!r}, entry, source="local", checkpoint="small.pth.tar")
print(type(load("model")).__name__, load("detector").predict(torch.zeros(3, 9, 9)).size)
"""


def test_hub_loads_from_another_folder(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "small.pth.tar", FPNSSD(ModelConfig(("a",), "resnet18", image_size=64, fpn_channels=16)))
    code = CODE.format(root=str(Path(__file__).parents[1]))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "FPNSSD (9, 9)"
