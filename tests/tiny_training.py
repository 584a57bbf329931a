"""A training that takes seconds, and whether two of them came to the same end."""

import csv
from dataclasses import replace
from pathlib import Path

import torch

from fpnssd.training.config import make_config
from model import load_checkpoint
from train import parse_args

TINY = [
    "backbone=test_resnet",
    "backbone_weights=none",
    "image_size=64",
    "fpn_channels=16",
    "batch_size=4",
    "eval_every=1",
]
TINY += ["precision=fp32", "device=cpu", "warmup_steps=2", "workers=0", "nominal_batch=4"]
TIMING = ("seconds", "images_per_s", "share_waiting")


def tiny_config(drawn, **changes):
    config = make_config(parse_args(["--set", *TINY, f"data={drawn}", "name=tiny", "epochs=2"]))
    return replace(config, **changes)


def same_end(one, other):
    """Whether two runs' checkpoints hold the same weights, averages, optimizers, scores and logs, bit for bit."""
    names = (one, other)
    one, other = (load_checkpoint(f"runs/{name}/last.pth.tar") for name in names)
    for key in ("raw_model", "optimizer", "torch_rng"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    torch.testing.assert_close(one["model"].state_dict(), other["model"].state_dict(), rtol=0, atol=0)
    assert [one[key] for key in ("step", "best", "stale", "sums")] == [
        other[k] for k in ("step", "best", "stale", "sums")
    ]
    logs = [[{k: v for k, v in row.items() if k not in TIMING} for row in end["log"]] for end in (one, other)]
    assert logs[0] == logs[1]
    files = [list(csv.DictReader(Path(f"runs/{name}/log.csv").read_text().splitlines())) for name in names]
    files = [[{k: v for k, v in row.items() if v and k not in TIMING} for row in file] for file in files]
    assert files[0] == [{k: str(v) for k, v in row.items() if v is not None} for row in logs[0]]
    assert files[0] == files[1]
