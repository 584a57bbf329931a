"""Small files that would cost much, or run code, or are of another kind: refused before anything is built."""

import io
import pickle
import time
import zipfile
from dataclasses import asdict

import pytest
import torch

import model as model_module
from fpnssd.model_config import ModelConfig
from fpnssd.safe_load import CheckpointError, check_file, load_tensors
from model import load_checkpoint

CONFIG = ModelConfig(("cat",), "test_efficientnet_gn", image_size=64, fpn_channels=2)


class Calls:
    """Pickles as a call of build_model."""

    def __init__(self, config, state):
        self.arguments = config, state

    def __reduce__(self):
        return model_module.build_model, self.arguments


@pytest.fixture(scope="module")
def state():
    return model_module.FPNSSD(CONFIG).state_dict()


def refused(path, seconds=5):
    """The sentence with which a file is refused."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert time.process_time() - start < seconds
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def zip_with(path, pickled, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3")
    return path


def doubled(times, instruction=b"\x86"):
    """A pickle of a tuple of a tuple ... twice each: 2 ** times objects to whoever visits them."""
    return b"\x80\x02)" + b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + instruction for k in range(times)) + b"."


def test_nested_tuples(tmp_path):
    assert "nests its objects" in refused(zip_with(tmp_path / "a.pth.tar", doubled(100)))
    chain = b"\x80\x02)" + b"\x85" * 100_000 + b"."
    assert "nests its objects" in refused(zip_with(tmp_path / "b.pth.tar", chain))


def test_nested_classes_of_a_plain_torch_load(tmp_path):
    """Without load_checkpoint, too: build_model prints no more than a line of what it refuses."""
    classes = []
    for _ in range(40):
        classes = [classes, classes]
    torch.save({"model": Calls({**asdict(CONFIG), "classes": classes}, {})}, tmp_path / "a.pth.tar")
    start = time.process_time()
    with pytest.raises(ValueError, match="classes must be"):
        torch.load(tmp_path / "a.pth.tar")
    assert time.process_time() - start < 5


def test_compressed(tmp_path):
    buffer = io.BytesIO()
    pickle.dump(["a" * 100] * 10, buffer, protocol=2)
    path = zip_with(tmp_path / "a.pth.tar", buffer.getvalue(), zipfile.ZIP_DEFLATED)
    assert "is compressed" in refused(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: torch.zeros(1).expand(t.shape), "is not a dense, contiguous tensor"),
        (lambda t: torch.zeros(t.shape, dtype=torch.complex64), "torch.complex64"),
        (lambda t: torch.zeros(t.shape, dtype=torch.float64), "torch.float64"),
        (lambda t: torch.zeros(t.shape, dtype=torch.int64), "torch.int64"),
        (lambda t: torch.zeros(t.shape, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda t: "text", "do not fit"),
    ],
)
def test_odd_tensors(state, change, sentence, tmp_path):
    name = max(state, key=lambda name: state[name].numel())
    torch.save({"model": Calls(asdict(CONFIG), {**state, name: change(state[name])})}, tmp_path / "a.pth.tar")
    assert sentence in refused(tmp_path / "a.pth.tar")


def test_tensors_that_share_their_memory(state, tmp_path):
    numbers = torch.zeros(max(tensor.numel() for tensor in state.values()), dtype=torch.float16)
    views = {name: numbers[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}
    torch.save({"model": Calls(asdict(CONFIG), views)}, tmp_path / "a.pth.tar")
    assert "share memory" in refused(tmp_path / "a.pth.tar")


def test_pickles_and_whole_objects_are_told_how_to_be_converted(tmp_path):
    torch.save({"epoch": 1, "model": torch.nn.Conv2d(1, 1, 1)}, tmp_path / "zip.pth.tar")
    torch.save({"epoch": 1}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth.tar").write_bytes(pickle.dumps({"a": 1}))
    for name in ("zip", "old", "plain"):
        assert "python -m fpnssd.legacy.convert" in refused(tmp_path / f"{name}.pth.tar")


def test_another_file_before_or_inside_of_the_archive(state, tmp_path):
    """torch would load the older format before it, or the directory that the end names; zipfile reads the last."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "good.pth.tar")
    torch.save({"b": 1}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    good, old = ((tmp_path / f"{name}.pth.tar").read_bytes() for name in ("good", "old"))
    shifted = io.BytesIO(old)
    with zipfile.ZipFile(shifted, "a") as archive:  # its offsets count the older format before it
        archive.writestr("a/data.pkl", pickle.dumps({}))
    for content in (old + good, good + good, good + b"more", shifted.getvalue()):
        (tmp_path / "two.pth.tar").write_bytes(content)
        assert "archive" in refused(tmp_path / "two.pth.tar")
    with zipfile.ZipFile(tmp_path / "folders.pth.tar", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("b/data", "")
    assert "more than one folder" in refused(tmp_path / "folders.pth.tar")


def test_numbers_that_are_not_there(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pth.tar")
    content = (tmp_path / "a.pth.tar").read_bytes()
    assert content.count((1000).to_bytes(2, "little")) > 1
    assert load_tensors(tmp_path / "a.pth.tar")["a"].shape == (1000,)
    huge = (
        pickle.dumps({}, protocol=2)[:-1]
        + b"(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aK\x00K\x00J\xff\xff\xff\x7ftQ0."
    )
    assert "more numbers than it has" in refused(zip_with(tmp_path / "b.pth.tar", huge))


def test_weights_in_torchs_older_format_are_taken_where_they_are_meant(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    check_file(tmp_path / "a.pth", old_format=True)
    with pytest.raises(CheckpointError, match="legacy"):
        check_file(tmp_path / "a.pth")
