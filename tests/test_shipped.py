"""The detector that ships: its file, and what it finds in photographs that scikit-image carries."""

from pathlib import Path

import pytest
import skimage.data
import torch
from torchvision.ops import box_iou

from fpnssd.data.voc import VOC_CLASSES
from fpnssd.inference.detector import load_detector
from model import DEFAULT_CHECKPOINT, FPNSSD

PATH = Path(DEFAULT_CHECKPOINT)
# Drawn by eye: the astronaut with her suit, without the helmet before her; the cat's head and what is seen of its body.
OBJECTS = {"astronaut": ("person", [20, 14, 364, 512]), "chelsea": ("cat", [0, 0, 402, 300])}


def test_file_is_small_and_loads_as_fp32():
    assert PATH.stat().st_size <= 25e6
    model = torch.load(PATH)["model"]  # torch's safe default
    assert isinstance(model, FPNSSD)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.classes == VOC_CLASSES


@pytest.mark.parametrize("name", OBJECTS)
def test_it_finds_what_is_in_a_photograph(name):
    label, box = OBJECTS[name]
    found = load_detector(PATH, "cpu", "torch").predict(getattr(skimage.data, name)(), min_score=0.25)
    assert found.names[0] == label
    assert box_iou(found.boxes[:1], torch.tensor([box]).float()).item() >= 0.5
