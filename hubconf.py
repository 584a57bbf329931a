"""torch.hub's door to the project, for code that does not live in this folder, and has not imported modules of its own
by the names of ours (model, utils, images, ...): Python knows one of a name.

detector = torch.hub.load("path/to/this/folder", "detector", source="local")
found = detector.predict("photo.jpg", min_score=0.4)
"""

from fpnssd.inference.detector import load_detector
from model import DEFAULT_CHECKPOINT, load_checkpoint

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL"]  # torch.hub looks whether these are installed


def detector(checkpoint=DEFAULT_CHECKPOINT, **options):
    """A detector.Detector of a checkpoint or exported file; options as for detector.load_detector."""
    return load_detector(checkpoint, **options)


def model(checkpoint=DEFAULT_CHECKPOINT):
    """An FPNSSD on the CPU, in evaluation mode."""
    return load_checkpoint(checkpoint)["model"]
