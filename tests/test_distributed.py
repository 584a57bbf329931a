"""Two processes do what one does: the same weights, the same scores; and one that fails ends both."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fpnssd.training import distributed
from model import load_checkpoint

ROOT = Path(__file__).parents[1]
TINY = [
    "backbone=test_resnet", "backbone_weights=none", "image_size=64", "fpn_channels=16", "precision=fp32", "device=cpu",
    "warmup_steps=2", "workers=1", "optimizer=sgd", "lr=0.01", "log_every=3", "epochs=10", "eval_every=5",
]  # fmt: skip


def start(folder, processes, *settings):
    """train.py alone, or under torchrun; returns (exit status, what it printed)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), "--set", *TINY, *settings]
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout


@pytest.fixture
def lists(drawn, tmp_path):
    """The drawn lists, the evaluation list cut to five images: two processes cannot share them evenly."""
    for split, most in (("train", 12), ("val", 5)):
        content = json.loads((drawn / f"{split}.json").read_text())
        kept = {image["id"] for image in content["images"][:most]}
        content["images"] = content["images"][:most]
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    return tmp_path


def test_two_processes_are_one(lists):
    """20 steps of 6 images: one process with 6, two with 3 each."""
    for name, processes, batch_size in (("one", 1, 6), ("two", 2, 3)):
        settings = (f"data={lists}", f"name={name}", f"batch_size={batch_size}", "nominal_batch=6")
        status, said = start(lists, processes, *settings)
        assert status == 0, said
        assert said.count("epoch 10/10") == 1  # one process speaks
    one, two = (load_checkpoint(lists / "runs" / name / "last.pth.tar") for name in ("one", "two"))
    assert one["step"] == 20
    assert_same_weights(one, two)
    for row, other in zip(one["log"], two["log"], strict=True):
        assert set(row) == set(other)
        for name in row:
            if name.startswith(("loss", "voc", "coco")):
                assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def start_agents(folder, *settings):
    """torchrun for each of two machines, on loopback, with a process each; returns both, which write to a pipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", port]
    return [
        subprocess.Popen(
            [*launcher, "--node-rank", str(machine), str(ROOT / "train.py"), *settings],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for machine in (0, 1)
    ]


def assert_same_weights(one, two):
    """Whether the checkpoints of two runs hold the same weights and averages to 1e-5."""
    assert one["step"] == two["step"]
    for key in ("raw_model", "model"):
        tensors = [end[key] if key == "raw_model" else end[key].state_dict() for end in (one, two)]
        for name, tensor in tensors[0].items():
            assert (tensor - tensors[1][name]).float().norm() <= 1e-5 * tensor.float().norm(), name


@pytest.mark.long
def test_two_machines_are_one(lists):
    """20 steps of 6 images: one process with 6; two machines with 3 each, one of them killed and both started again."""
    settings = ("--set", *TINY, f"data={lists}", "nominal_batch=6", "save_minutes=0")
    status, said = start(lists, 1, *settings[1:], "name=one", "batch_size=6")
    assert status == 0, said
    agents = start_agents(lists, *settings, "name=two", "batch_size=3")
    while not (lists / "runs/two/log.csv").exists() and agents[0].poll() is None:
        time.sleep(0.05)
    agents[1].kill()  # its process notices it by itself
    begin = time.monotonic()
    said = agents[0].communicate(timeout=60)[0]
    assert time.monotonic() - begin < 60
    assert agents[0].returncode != 0
    assert "process 0 lost the others" in said
    assert "exits, as the torchrun that started it was killed" in agents[1].communicate(timeout=60)[0]
    assert load_checkpoint(lists / "runs/two/last.pth.tar")["step"] < 20
    agents = start_agents(lists, "--name", "two", "--resume")
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert_same_weights(*(load_checkpoint(lists / "runs" / name / "last.pth.tar") for name in ("one", "two")))


def test_sigterm_stops_all_processes_at_one_step(lists):
    settings = [*TINY, f"data={lists}", "name=s", "epochs=300", "eval_every=300", "batch_size=3", "nominal_batch=6"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), "--set", *settings],
        cwd=lists,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (lists / "runs/s/log.csv").exists():
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=120)[0]
    step = load_checkpoint(lists / "runs/s/last.pth.tar")["step"]
    assert f"stopped after step {step}; continue with --name s --resume" in said
    assert "lost" not in said


def test_a_process_that_fails_ends_the_job_with_its_error(lists):
    content = json.loads((lists / "train.json").read_text())
    content["images"][3]["file_name"] = "gone.jpg"
    (lists / "train.json").write_text(json.dumps(content))
    status, said = start(lists, 2, f"data={lists}", "name=broken", "batch_size=3", "nominal_batch=6")
    assert status != 0
    assert "gone.jpg is missing" in said
    assert 'train.py", line' not in said  # torchrun shows its own traceback, not one of ours


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.num_processes(), distributed.is_main()) == (0, 1, True)
    tensor = torch.tensor(3)
    assert distributed.sum_over_processes(tensor) is tensor
    assert distributed.gather("a") == ["a"]
    assert distributed.broadcast("b") == "b"
    with distributed.init_distributed(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
