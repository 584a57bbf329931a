"""Runs that are stopped, killed and resumed end as if nothing had happened; what cannot be resumed is refused."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import TINY, same_end, tiny_config

import train as train_module
from fpnssd.data.data_list import DataList
from fpnssd.training.failures import StopOnSignal
from fpnssd.training.lock import lock_run
from model import load_checkpoint, save_checkpoint
from train import main, train
from utils import InputError

ROOT = Path(__file__).parents[1]


def test_resume_without_a_run_says_so(drawn, in_tmp):
    with pytest.raises(SystemExit, match="nothing to resume: there is no run runs/tiny in "):
        main(["--resume", "--set", *TINY, f"data={drawn}", "name=tiny", "epochs=2"])


@pytest.mark.parametrize(
    ("stop_after", "number"),
    [
        (3, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.long),
        pytest.param(4, signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_stopped_and_resumed_is_straight_through(drawn, in_tmp, monkeypatch, stop_after, number):
    straight = tiny_config(drawn, name="straight")
    train(straight)
    train_step = train_module.Trainer.train_step

    def interrupted(self, *arguments):
        if self.state.step + 1 == stop_after:
            os.kill(os.getpid(), number)
        return train_step(self, *arguments)

    monkeypatch.setattr(train_module.Trainer, "train_step", interrupted)
    config = replace(straight, name="stopped")
    train(config)
    assert load_checkpoint("runs/stopped/last.pth.tar")["step"] == stop_after
    monkeypatch.setattr(train_module.Trainer, "train_step", train_step)
    train(config, resume=True)
    same_end("straight", "stopped")
    assert load_checkpoint("runs/stopped/best.pth.tar")["step"] == load_checkpoint("runs/straight/best.pth.tar")["step"]


def start(folder, arguments, checkpoint=None):
    """Starts train.py as a user would, on one thread; returns the process once `checkpoint` is there."""
    code = f"import torch, sys; torch.set_num_threads(1); sys.path.insert(0, {str(ROOT)!r}); import train; train.main()"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while checkpoint and process.poll() is None and not (folder / checkpoint).exists():
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([(3, 0.3)], id="1"),
        pytest.param([(k % 4, 0.2 + 0.13 * k) for k in range(10)], id="10", marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed_is_straight_through(drawn, in_tmp, kills):
    """kill -9 at moments that fall anywhere, writing a checkpoint included; each time with other workers."""
    epochs = 3 * len(kills)
    arguments = ["--set", *TINY, f"data={drawn}", f"epochs={epochs}", f"eval_every={epochs}", "save_minutes=0.0"]
    said = start(in_tmp, [*arguments, "name=straight", "workers=1"]).communicate(timeout=300)[0]
    assert f"epoch {epochs}/{epochs}" in said
    for number, (workers, moment) in enumerate(kills):
        resume = ["--resume"] * (number > 0)
        process = start(in_tmp, [*arguments, "name=killed", f"workers={workers}", *resume], "runs/killed/last.pth.tar")
        if number:
            while "resuming runs/killed" not in process.stdout.readline():
                assert process.poll() is None
        time.sleep(moment)
        process.kill()
        process.communicate()
    start(in_tmp, [*arguments, "name=killed", "workers=1", "--resume"]).communicate(timeout=300)
    same_end("straight", "killed")


def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on(drawn, in_tmp):
    arguments = ["--set", *TINY, f"data={drawn}", "name=c", "epochs=300", "eval_every=300", "workers=1"]
    process = start(in_tmp, arguments, "runs/c/last.pth.tar")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loader's worker gets it too
    said = process.communicate(timeout=120)[0]
    assert "--name c --resume" in said
    assert "Traceback" not in said
    step = load_checkpoint("runs/c/last.pth.tar")["step"]
    assert 0 < step < 900
    process = start(in_tmp, ["--name", "c", "--resume", "--set", "save_minutes=0.001"])  # the run knows its recipe
    line = ""
    while f"runs/c/last.pth.tar at step {step}" not in line:
        line = process.stdout.readline()
        assert process.poll() is None
    while load_checkpoint("runs/c/last.pth.tar")["step"] == step:
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "--name c --resume" in said
    assert load_checkpoint("runs/c/last.pth.tar")["step"] > step


def test_a_signal_to_the_group_comes_with_the_end_of_a_worker(monkeypatch):
    """Both in one moment, as when a scheduler ends a job: nothing is printed of a signal that was lost."""
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    both = {signal.SIGTERM, signal.SIGCHLD}
    before = signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's loader has one
    try:
        with StopOnSignal() as stop:
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            for number in both:
                signal.pthread_kill(threading.get_ident(), number)  # no other thread is to take it now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        assert stop.requested
        assert not lost
    finally:
        signal.signal(signal.SIGCHLD, before)


LACKING = """
import fcntl, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
sys.modules["resource"] = None
del signal.SIGCHLD
os_open, os_fsync = os.open, os.fsync

def files_alone(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return os_open(path, *arguments, **options)

def written_alone(handle):
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    os_fsync(handle)

import train
os.open, os.fsync, sys.platform = files_alone, written_alone, "win32"
step = train.Trainer.train_step
train.Trainer.train_step = lambda *arguments: (signal.raise_signal(signal.SIGINT), step(*arguments))[1]
train.main()
"""


def test_training_where_what_windows_lacks_is_lacking(drawn, in_tmp):
    """No module resource, no SIGCHLD, folders that are not opened, files that are synced only by who may write them."""
    arguments = ["--set", *TINY, f"data={drawn}", "name=w"]
    done = subprocess.run([sys.executable, "-c", LACKING, ROOT, *arguments], capture_output=True, text=True)
    assert "--name w --resume" in done.stdout + done.stderr
    assert load_checkpoint("runs/w/last.pth.tar")["step"] == 1


def test_what_is_changed_is_said_and_what_cannot_is_refused(drawn, in_tmp, capsys):
    train(tiny_config(drawn, epochs=1))
    capsys.readouterr()
    metrics = main(["--resume", "--name", "tiny", "--epochs", "2", "--lr", "0.5", "--set", "eval_every=2"])
    said = capsys.readouterr().out
    assert "changed: epochs 1 -> 2" in said
    assert "changed: lr 0.001 -> 0.5" in said
    assert "eval_every 1 ->" not in said  # where it runs and when it looks may change without a word
    assert metrics is not None
    checkpoint = load_checkpoint("runs/tiny/last.pth.tar")
    assert checkpoint["optimizer"]["param_groups"][-1]["initial_lr"] == 0.5
    for changes, refused in (
        (["--seed", "1"], "seed 0 -> 1"),
        (["--set", "optimizer=sgd"], "optimizer 'adamw' -> 'sgd'"),
        (["--set", "fpn_channels=32"], "other classes or shapes"),
        (["--batch-size", "3"], "4 images per step .*, not 3"),
    ):
        with pytest.raises(SystemExit, match=refused):
            main(["--resume", "--name", "tiny", "--epochs", "3", *changes])
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 6
    # The same images a step in other pieces is the same run.
    main(["--resume", "--epochs", "3", "--batch-size", "2", "--set", "name=tiny"])
    # So are other rates and another precision: groups are the same whatever their values.
    capsys.readouterr()
    main(
        [
            "--resume",
            "--name",
            "tiny",
            "--epochs",
            "4",
            "--set",
            "backbone_lr_scale=1",
            "weight_decay=0",
            "precision=fp16",
        ]
    )
    assert "changed: precision 'fp32' -> 'fp16'" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named(drawn, in_tmp):
    train(tiny_config(drawn, name="a", epochs=1))
    path = Path("runs/a/last.pth.tar")
    whole, weights = path.read_bytes(), load_checkpoint(path)["model"].state_dict()
    # A byte in the middle of some weight; then bytes in the zip file's own bookkeeping, and a file cut short.
    for place in (len(whole) // 2, 0, len(whole) - 30):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"runs/a/last\.pth\.tar is damaged.*--weights runs/a/best\.pth\.tar"):
            train(tiny_config(drawn, name="a", epochs=1), resume=True)
    # The size in an entry's own header is read by nobody: the directory at the end has it too. The weights are whole.
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 0xFF]) + whole[21:])
    loaded = load_checkpoint(path)["model"].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    path.write_bytes(whole[:1000])
    with pytest.raises(SystemExit, match=r"runs/a/last\.pth\.tar is damaged and cannot be resumed"):
        main(["--resume", "--name", "a"])


def test_last_is_there_at_every_moment(drawn, in_tmp, monkeypatch):
    """An evaluation or a notebook may read it while training goes on."""
    last = Path("runs/a/last.pth.tar")
    train(tiny_config(drawn, name="a", epochs=1))
    exists = []

    def watched(call):
        def watching(*arguments, **keywords):
            result = call(*arguments, **keywords)
            exists.append(last.exists())
            return result

        return watching

    for name in ("replace", "unlink", "rename"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    train(tiny_config(drawn, name="a", epochs=2), resume=True)
    assert exists
    assert all(exists)
    assert load_checkpoint(last)["step"] == 6


def copied_lists(drawn, **changes):
    """The drawn lists in ./data, with some top-level keys of train.json changed; the images stay where they are."""
    Path("data").mkdir(exist_ok=True)
    for split in ("train", "val"):
        content = json.loads((drawn / f"{split}.json").read_text())
        content["info"]["image_root"] = str(DataList.load(drawn / f"{split}.json").image_root.resolve())
        Path(f"data/{split}.json").write_text(json.dumps(content | (changes if split == "train" else {})))


def test_the_content_of_the_lists_decides_about_resuming(drawn, in_tmp, capsys):
    train(tiny_config(drawn, epochs=1))
    content = json.loads((drawn / "train.json").read_text())
    other_labels = [{**entry, "category_id": content["categories"][0]["id"]} for entry in content["annotations"]]
    copied_lists(drawn, annotations=other_labels)
    with pytest.raises(InputError, match=r"trained on a different list than data/train\.json"):
        train(tiny_config("data", epochs=2), resume=True)
    copied_lists(drawn, images=content["images"][::-1])  # the same images in another order
    with pytest.raises(InputError, match="trained on a different list"):
        train(tiny_config("data", epochs=2), resume=True)
    # The same content under another path, and formatted otherwise, is the same list; another val list is a note.
    copied_lists(drawn)
    Path("data/train.json").write_text(json.dumps(json.loads(Path("data/train.json").read_text()), indent=1))
    val = json.loads(Path("data/val.json").read_text())
    Path("data/val.json").write_text(json.dumps({**val, "images": val["images"][::-1]}))
    capsys.readouterr()
    last = load_checkpoint("runs/tiny/last.pth.tar")
    del last["format_version"]
    save_checkpoint("runs/tiny/last.pth.tar", last.pop("model"), **{**last, "best": 0.99})
    train(tiny_config("data", epochs=2), resume=True)
    assert "changed: the content of the evaluation list" in capsys.readouterr().out
    assert load_checkpoint("runs/tiny/best.pth.tar")["step"] == 6  # scores on the other list say nothing
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 6


def test_a_run_of_format_version_1_is_not_resumed(drawn, in_tmp):
    train(tiny_config(drawn, epochs=1))
    content = json.loads(Path("runs/tiny/config.json").read_text())
    content["trunk"] = content.pop("backbone")
    Path("runs/tiny/config.json").write_text(json.dumps(content))
    refused = r"runs/tiny is a run of format version 1 and cannot be resumed; --weights runs/tiny/best\.pth\.tar"
    with pytest.raises(SystemExit, match=refused):
        main(["--resume", "--name", "tiny"])
    # The checkpoint alone says so too.
    checkpoint = load_checkpoint("runs/tiny/last.pth.tar")
    save_checkpoint("runs/tiny/last.pth.tar", checkpoint.pop("model"), **checkpoint | {"train_config": content})
    with pytest.raises(InputError, match=refused):
        train(tiny_config(drawn, epochs=2), resume=True)


def test_handlers_are_restored_after_a_training(drawn, in_tmp, monkeypatch):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    train_step = train_module.Trainer.train_step

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *arguments)

    monkeypatch.setattr(train_module.Trainer, "train_step", interrupted)
    train(tiny_config(drawn))
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 1
    assert [signal.getsignal(number) for number in numbers] == before


TRY_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.write("process 1 on elsewhere")
file.flush()
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


def try_lock(path, seconds):
    """A process without any of our code that locks a file for some seconds, or fails if it is locked."""
    return subprocess.Popen([sys.executable, "-c", TRY_LOCK, path, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_run_that_is_being_trained_is_refused(drawn, in_tmp):
    Path("runs/tiny").mkdir(parents=True)
    holder = try_lock("runs/tiny/.lock", 600)
    assert holder.stdout.readline() == "locked\n"
    refused = "runs/tiny is being trained by process 1 on elsewhere: .* --name"
    try:
        with pytest.raises(InputError, match=refused):
            train(tiny_config(drawn, epochs=1))
        Path("runs/tiny/last.pth.tar").touch()
        with pytest.raises(InputError, match=refused):
            train(tiny_config(drawn, epochs=1), resume=True)
        Path("runs/tiny/last.pth.tar").unlink()
    finally:
        holder.kill()  # the worst of deaths gives the lock back
        holder.wait()
    train(tiny_config(drawn, epochs=1))
    assert load_checkpoint("runs/tiny/last.pth.tar")["step"] == 3


def test_workers_that_outlive_a_training_hold_no_lock(in_tmp):
    with lock_run("tiny", resume=False):
        worker = os.fork()
        if worker == 0:  # as a loader's worker, which notices its parent's end after seconds
            time.sleep(600)
            os._exit(0)
        assert try_lock("runs/tiny/.lock", 0).communicate()[0] == ""
    try:
        assert try_lock("runs/tiny/.lock", 0).communicate()[0] == "locked\n"
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_file_system_without_locks_is_named(drawn, in_tmp, monkeypatch, capsys):
    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refused)
    train(tiny_config(drawn, epochs=1))
    assert "runs/tiny cannot be locked (No locks available): nothing stops a second" in capsys.readouterr().err
