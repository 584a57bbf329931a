"""Old files made with classes of the original's names: converted, equal to plain functions, hostile ones refused."""

import copy
import math
import os
import pickle
import sys
import tarfile
import types
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50

from fpnssd.data.voc import VOC_CLASSES
from fpnssd.legacy.convert import convert, main
from fpnssd.legacy.network import original_config
from fpnssd.safe_load import CheckpointError
from model import load_checkpoint, make_priors

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # as torch's older format keeps it
LEVELS = {"p3": 4, "p4": 6, "p5": 6, "p6": 6, "p7": 4, "p8": 4, "p9": 4}  # priors a cell


def make_old(base_module, head_module):
    """The original's object, random, its classes in modules of these names."""

    def new_class(name, module):
        made = type(name, (nn.Module,), {"__module__": module})
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[module], name, made)
        return made

    torch.manual_seed(0)
    base, heads, model = (
        new_class("FPNBase", base_module)(),
        new_class("PredictionConvolutions", head_module)(),
        new_class("SSD300", base_module)(),
    )
    base.resnet = resnet50()
    base.toplayer = nn.Conv2d(2048, 256, 3)
    base.lat_p4, base.lat_p3 = nn.Conv2d(1024, 256, 1), nn.Conv2d(512, 256, 1)
    base.smooth1, base.smooth2 = (nn.Conv2d(256, 256, 3, padding=1) for _ in range(2))
    base.conv6 = nn.Conv2d(2048, 256, 3, stride=2, padding=1)
    for level in (7, 8, 9):
        setattr(base, f"conv{level}", nn.Conv2d(256, 256, 3, stride=2, padding=1))
    for level in (6, 7, 8):
        setattr(base, f"bn{level}", nn.BatchNorm2d(256))
    for name, count in LEVELS.items():
        setattr(heads, f"loc_{name}", nn.Conv2d(256, count * 4, 3, padding=1))
        setattr(heads, f"cl_{name}", nn.Conv2d(256, count * 21, 3, padding=1))
    model.n_classes, model.base, model.pred_convs = 21, base, heads
    model.rescale_factors = nn.Parameter(torch.rand(1, 256, 1, 1) * 20)
    model.priors_cxcy = torch.rand(8532, 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as of a network that has seen something
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def plain_answer(state, images):
    """Offsets and logits of the original's weights, layer by layer, from what is written about its network."""

    def conv(name, x, **how):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **how)

    def norm(name, x):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys), eps=1e-5)

    x = (images.float() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    x = F.relu(norm("base.resnet.bn1", conv("base.resnet.conv1", x, stride=2, padding=3)))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    features = []
    for layer, (blocks, first_stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2)), start=1):
        for block in range(blocks):
            name, stride = f"base.resnet.layer{layer}.{block}", first_stride if block == 0 else 1
            y = F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", x)))
            y = F.relu(norm(f"{name}.bn2", conv(f"{name}.conv2", y, stride=stride, padding=1)))
            y = norm(f"{name}.bn3", conv(f"{name}.conv3", y))
            if block == 0:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride=stride))
            x = F.relu(x + y)
        features.append(x)
    _, c3, c4, c5 = features
    maps = {"p5": conv("base.toplayer", c5)}
    p4 = conv("base.lat_p4", c4) + F.interpolate(maps["p5"], size=(19, 19), mode="bilinear", align_corners=False)
    p3 = conv("base.lat_p3", c3) + F.interpolate(p4, size=(38, 38), mode="bilinear", align_corners=False)
    maps["p4"] = conv("base.smooth1", p4, padding=1)
    p3 = conv("base.smooth2", p3, padding=1)
    maps["p3"] = p3 / p3.square().sum(dim=1, keepdim=True).sqrt() * state["rescale_factors"]
    maps["p6"] = conv("base.conv6", c5, stride=2, padding=1)
    for level in (7, 8, 9):
        before = F.relu(norm(f"base.bn{level - 1}", maps[f"p{level - 1}"]))
        maps[f"p{level}"] = conv(f"base.conv{level}", before, stride=2, padding=1)
    answers = []
    for kind, width in (("loc", 4), ("cl", 21)):
        of_levels = [conv(f"pred_convs.{kind}_{name}", maps[name], padding=1) for name in LEVELS]
        answers.append(torch.cat([y.permute(0, 2, 3, 1).reshape(len(images), -1, width) for y in of_levels], dim=1))
    return answers


@pytest.mark.parametrize(
    ("base_module", "head_module", "zipped"),
    [
        ("__main__", "__main__", True),
        ("fpnssd300", "fpnssd300", False),
        ("models.fpnssd300", "models.fpnssd300", True),
        ("FPNBase", "PredictionHead", False),
    ],
)
@torch.no_grad()
def test_old_files_become_ours(tmp_path, capsys, base_module, head_module, zipped):
    old = make_old(base_module, head_module)
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1, momentum=0.9)
    path = tmp_path / "old.pth.tar"
    content = {"epoch": 280, "model": old, "optimizer": optimizer}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    main([str(path), str(tmp_path / "new.pth.tar")])
    said = capsys.readouterr().out
    assert "epoch 280; left out: the optimizer, base.resnet.fc" in said
    model = load_checkpoint(tmp_path / "new.pth.tar")["model"]
    assert model.config == original_config(VOC_CLASSES)
    images = torch.randint(0, 256, (2, 3, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    offsets, logits = plain_answer(old.eval().state_dict(), images)
    for found, expected in zip(model(images), (offsets, logits), strict=True):
        assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


def test_the_originals_priors():
    """Box by box from the description: level, row, column, then the shapes in their order; clamped."""
    sides, scales = (38, 19, 8, 5, 3, 2, 1), (0.2, 0.317, 0.433, 0.55, 0.667, 0.783, 0.9)
    expected = []
    for level, (side, scale) in enumerate(zip(sides, scales, strict=True)):
        extra = math.sqrt(scale * scales[level + 1]) if level < 6 else 1.0
        ratios = (2.0, 3.0, 0.5, 0.333) if level in (1, 2, 3) else (2.0, 0.5)
        shapes = [(scale, scale), (extra, extra)] + [(scale * math.sqrt(r), scale / math.sqrt(r)) for r in ratios]
        for row in range(side):
            for column in range(side):
                expected += [((column + 0.5) / side, (row + 0.5) / side, *shape) for shape in shapes]
    priors = make_priors(original_config(("a",)), [(side, side) for side in sides])
    assert len(priors) == 8532
    torch.testing.assert_close(priors, torch.tensor(expected).clamp(0, 1))


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_something_is_refused(tmp_path, zipped):
    old = make_old("__main__", "__main__")
    old.extra = Hostile(f"touch {tmp_path / 'ran'}")
    torch.save({"model": old}, tmp_path / "bad.pth.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"bad\.pth\.tar is refused, and nothing .*names posix\.system"):
        convert(tmp_path / "bad.pth.tar")
    with pytest.raises(SystemExit, match=r"names posix\.system"):
        main([str(tmp_path / "bad.pth.tar"), str(tmp_path / "new.pth.tar")])
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new.pth.tar").exists()


@pytest.mark.parametrize(
    "name", [("builtins", "eval"), ("torch", "load"), ("torch.hub", "load"), ("torch.utils", "data"), ("nn", "Module")]
)
def test_other_names_are_refused(tmp_path, name):
    module, attribute = name
    pickled = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    with zipfile.ZipFile(tmp_path / "x.pth.tar", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError, match=rf"names {module}\.{attribute}"):
        convert(tmp_path / "x.pth.tar")


def test_other_containers_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:  # torch.load would unpack it
        archive.add(tmp_path / "script.pt", "storages")
    for name in ("script.pt", "old.tar"):
        with pytest.raises(CheckpointError, match=rf"{name} is refused, and nothing in it was run"):
            convert(tmp_path / name)


def test_what_does_not_fit_is_named(tmp_path):
    old = make_old("__main__", "__main__")
    changed = {"lacks": copy.deepcopy(old), "shape": copy.deepcopy(old)}
    del changed["lacks"].base.conv8
    changed["shape"].pred_convs.cl_p3 = nn.Conv2d(256, 4 * 4, 3, padding=1)
    for name, said in (
        ("lacks", r"lacks 'base\.conv8\.weight'"),
        ("shape", r"'pred_convs\.cl_p3\.weight' has the shape"),
    ):
        torch.save({"model": changed[name]}, tmp_path / f"{name}.pth.tar")
        with pytest.raises(CheckpointError, match=said):
            convert(tmp_path / f"{name}.pth.tar")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"model": 1}))
    torch.save({"epoch": 1}, tmp_path / "none")
    whole = (tmp_path / "lacks.pth.tar").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "pickle", "none", "cut"):
        with pytest.raises(CheckpointError, match=name):
            convert(tmp_path / name)
    with pytest.raises(SystemExit, match="no file 'nowhere'"):
        main(["nowhere", str(tmp_path / "x")])
