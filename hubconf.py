"""Entry points of torch.hub, for code outside this folder.

    detector = torch.hub.load("path/to/this/folder", "detector", source="local")
    detections = detector.predict("photo.jpg", min_score=0.4)

They fail in a program that has imported other modules called `model`, `utils` or `datasets`, as Python loads only one
module per name.
"""

import os
from typing import Any

from fpnssd.inference.detector import Detector, load_detector
from model import DEFAULT_CHECKPOINT, FPNSSD, load_checkpoint

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL"]  # torch.hub checks that these are installed


def detector(checkpoint: str | os.PathLike = DEFAULT_CHECKPOINT, **options: Any) -> Detector:
    """A Detector of a checkpoint or exported file.

    Args:
        checkpoint: path of the file; by default the shipped one.
        options: of fpnssd.inference.detector.load_detector: device, runtime, precision.
    """
    return load_detector(checkpoint, **options)


def model(checkpoint: str | os.PathLike = DEFAULT_CHECKPOINT) -> FPNSSD:
    """The network of a checkpoint, on the CPU and in evaluation mode."""
    return load_checkpoint(checkpoint)["model"]
