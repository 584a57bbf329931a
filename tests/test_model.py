"""Priors by hand, offsets there and back, decoding against a plain loop, checkpoints that load safely or not at all."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert

import model as model_module
from model import (
    FPNSSD,
    CheckpointError,
    ModelConfig,
    decode_offsets,
    encode_boxes,
    load_checkpoint,
    make_priors,
    postprocess,
    save_checkpoint,
)
from utils import InputError

ROOT = Path(__file__).parents[1]
SIDES = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]


def small_config(**changes):
    return ModelConfig(
        **{"classes": ("cat", "dog"), "backbone": "resnet18", "image_size": 64, "fpn_channels": 32, **changes}
    )


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return FPNSSD(small_config()).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Priors and offsets


def test_priors_of_the_300_pixel_network():
    priors = make_priors(ModelConfig(classes=("a",)), SIDES)
    assert priors.shape == (8748, 4)
    # P8, the 2 x 2 level, is the last but one: scale .76, then .9; four shapes a cell, rows before columns.
    extra = math.sqrt(0.76 * 0.9)
    wide, narrow = 0.76 * math.sqrt(2), 0.76 / math.sqrt(2)
    shapes = [(0.76, 0.76), (extra, extra), (wide, narrow), (narrow, wide)]
    expected = [(x, y, *shape) for y in (0.25, 0.75) for x in (0.25, 0.75) for shape in shapes]
    torch.testing.assert_close(priors[-20:-4], torch.tensor(expected))
    # P9: one cell, the extra square halfway (in the logarithm) to the whole image.
    assert priors[-3].tolist() == pytest.approx([0.5, 0.5, math.sqrt(0.9), math.sqrt(0.9)])
    # P3: the second cell is to the right of the first; six shapes a cell from P4 on, 3 and 1/3 last.
    assert priors[4].tolist() == pytest.approx([1.5 / 38, 0.5 / 38, 0.1, 0.1])
    ratios = priors[38 * 38 * 4 :][:6]
    assert (ratios[:, 2] / ratios[:, 3]).tolist() == pytest.approx([1, 1, 2, 1 / 2, 3, 1 / 3])


def test_offsets_by_hand():
    priors = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.6, 0.5, 0.4, 0.2]])
    expected = [0.1 / 0.2 / 0.1, 0.0, math.log(2) / 0.2, -math.log(2) / 0.2]
    assert encode_boxes(box, priors)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_offsets_there_and_back():
    generator = torch.Generator().manual_seed(0)
    priors = make_priors(ModelConfig(classes=("a",)), SIDES)
    boxes = torch.rand(3, len(priors), 4, generator=generator) * 0.9 + 0.05  # (3, P, 4)
    torch.testing.assert_close(decode_offsets(encode_boxes(boxes, priors), priors), boxes, rtol=1e-5, atol=1e-6)


def test_large_offsets_are_clamped_as_torchvision_does():
    coder = BoxCoder(weights=(1 / 0.1, 1 / 0.1, 1 / 0.2, 1 / 0.2))
    priors = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    for number in (500.0, 20.0, 1.0, -500.0):
        offsets = torch.tensor([[0.3, -0.2, number, number]])
        expected = coder.decode_single(offsets, box_convert(priors, "cxcywh", "xyxy"))
        boxes = box_convert(decode_offsets(offsets, priors), "cxcywh", "xyxy")
        torch.testing.assert_close(boxes, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet50", "rexnet_100", "tf_efficientnet_lite0", "tf_efficientnet_lite2"]
)
def test_backbones_and_shapes(backbone):
    with torch.device("meta"), torch.no_grad():  # shapes alone
        model = FPNSSD(ModelConfig(classes=("a", "b", "c"), backbone=backbone, fpn_channels=64)).eval().to("meta")
        offsets, logits = model(torch.zeros(1, 3, 300, 300, dtype=torch.uint8))
    assert offsets.shape == (1, 8748, 4)
    assert logits.shape == (1, 8748, 4)
    assert model.priors.shape == (8748, 4)


def test_512_pixels():
    model = FPNSSD(small_config(image_size=512)).eval()
    cells = [64, 32, 16, 8, 4, 2, 1]
    counts = [side**2 * count for side, count in zip(cells, (4, 6, 6, 6, 4, 4, 4), strict=True)]
    with torch.no_grad():
        offsets, logits = model(torch.zeros(1, 3, 512, 512, dtype=torch.uint8))
    assert len(model.priors) == offsets.shape[1] == logits.shape[1] == sum(counts)


def test_level_sides_are_those_of_the_maps_and_are_kept(tmp_path, monkeypatch):
    """convnext rounds the halves of odd sides down where others round up; loading runs no network."""
    for backbone, first in (("resnet18", 13), ("convnext_atto", 12)):
        model = FPNSSD(small_config(backbone=backbone, image_size=100)).eval()
        levels = model.fpn(model.backbone(torch.zeros(1, 3, 100, 100)))
        assert model.config.level_sides == tuple(tuple(level.shape[-2:]) for level in levels)
        assert model.config.level_sides[0] == (first, first)
    save_checkpoint(tmp_path / "a.pth.tar", model)
    monkeypatch.setattr(FPNSSD, "_level_sides", lambda *_: pytest.fail("the network was run"))
    assert torch.equal(load_checkpoint(tmp_path / "a.pth.tar")["model"].priors, model.priors)
    assert torch.equal(model_module.priors_of(model.config), model.priors)


def test_a_cell_sees_its_own_place():
    """Outputs are in the order of the priors: a change in one corner moves the P3 cells of that corner most."""
    torch.manual_seed(0)
    model = FPNSSD(small_config(image_size=128)).eval()
    images = torch.full((2, 3, 128, 128), 100.0)
    images[1, :, 96:, :32] = 200.0  # bottom left
    with torch.no_grad():
        offsets, _ = model(images)
    change = (offsets[1] - offsets[0]).abs().sum(dim=1)[: 16 * 16 * 4].view(16, 16, 4).sum(dim=2)
    row, column = divmod(change.argmax().item(), 16)
    assert row >= 11
    assert column <= 4


def test_normalisation_is_inside(small_model):
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        offsets, logits = small_model(image)
        again = small_model(image.float())
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        levels = small_model.fpn(small_model.backbone((image / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)))
        first = small_model.box_heads[0](levels[0])  # (1, 4 * 4, 8, 8)
    assert torch.equal(offsets, again[0])
    assert torch.equal(logits, again[1])
    assert offsets[0, 5].tolist() == pytest.approx(first[0, 4:8, 0, 1].tolist(), abs=1e-4)  # cell (0, 1), second shape


def test_wrong_image_shape_is_named(small_model):
    with pytest.raises(ValueError, match=r"\(B, 3, 64, 64\), not \(1, 3, 60, 64\)"):
        small_model(torch.zeros(1, 3, 60, 64))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def plain_decode(offsets, logits, priors, size, min_score, max_overlap, top_k):
    """Every (prior, class) pair of one image, class by class, box by box; no cap."""
    scores = logits.softmax(dim=-1)[:, 1:]
    height, width = size
    boxes = decode_offsets(offsets, priors)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1).clamp(0, 1)
    corners = (corners * torch.tensor([width, height, width, height])).tolist()
    found = []
    for c in range(scores.shape[1]):
        order = sorted(range(len(priors)), key=lambda p: (-scores[p, c].item(), p))
        kept = []
        for p in order:
            x0, y0, x1, y1 = corners[p]
            if scores[p, c].item() <= min_score or x1 <= x0 or y1 <= y0:
                continue
            if all(overlap(corners[p], corners[q]) <= max_overlap for q in kept):
                kept.append(p)
        found += [(-scores[p, c].item(), p, c + 1) for p in kept]
    return [(label, p, corners[p], -negative) for negative, p, label in sorted(found)][:top_k]


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return intersection / (sum(areas) - intersection)


def decoding_cases(count, num_priors):
    """Random networks' outputs: untrained, sure of themselves, full of ties, all equal."""
    generator = torch.Generator().manual_seed(0)
    for case in range(count):
        priors = torch.rand(num_priors, 4, generator=generator) * 0.6 + 0.1
        offsets = torch.randn(2, num_priors, 4, generator=generator)
        logits = torch.randn(2, num_priors, 4, generator=generator)
        if case % 4 == 1:
            logits = logits * 6
        elif case % 4 == 2:
            logits = logits.round()  # many equal scores
        elif case % 4 == 3:
            logits = torch.zeros_like(logits)
        yield offsets, logits, priors


@pytest.mark.parametrize("cases", [12, pytest.param(400, marks=pytest.mark.long)])
@pytest.mark.parametrize("first_candidates", [4, 1024])
def test_postprocess_equals_decoding_without_cap(cases, first_candidates, monkeypatch):
    monkeypatch.setattr(model_module, "FIRST_CANDIDATES", first_candidates)  # 4: many rounds; 1024: one
    sizes = [(240, 320), (100, 77)]
    for case, (offsets, logits, priors) in enumerate(decoding_cases(cases, 90)):
        min_score, max_overlap, top_k = ((0.01, 0.45, 200), (0.3, 0.5, 7), (0.0, 0.1, 15))[case % 3]
        results = postprocess(offsets, logits, priors, sizes, min_score, max_overlap, top_k)
        for i in range(2):
            expected = plain_decode(offsets[i], logits[i], priors, sizes[i], min_score, max_overlap, top_k)
            assert results[i]["labels"].tolist() == [label for label, *_ in expected]
            assert results[i]["scores"].tolist() == [score for *_, score in expected]
            boxes = torch.tensor([box for _, _, box, _ in expected]).reshape(-1, 4)
            torch.testing.assert_close(results[i]["boxes"], boxes, rtol=1e-6, atol=1e-4)
            (alone,) = postprocess(
                offsets[i : i + 1], logits[i : i + 1], priors, sizes[i : i + 1], min_score, max_overlap, top_k
            )
            assert all(torch.equal(alone[name], results[i][name]) for name in alone)


@pytest.mark.parametrize("kind", ["untrained", "sure", "all equal", "ties", "one place"])
def test_postprocess_of_a_whole_network_equals_one_round_over_all_candidates(kind, monkeypatch):
    """Of all 8,748 priors and 5 classes, where the plain loop would take hours."""
    generator = torch.Generator().manual_seed(1)
    priors = make_priors(ModelConfig(("a",)), [(side, side) for side in (38, 19, 10, 5, 3, 2, 1)])
    offsets = torch.randn(1, len(priors), 4, generator=generator)
    logits = torch.randn(1, len(priors), 6, generator=generator) * (8 if kind == "sure" else 0.1)
    if kind == "all equal":
        logits = torch.zeros_like(logits)
    elif kind == "ties":
        logits = logits.mul(20).round()
    elif kind == "one place":  # thousands of boxes that overlap: 5 survive, and all have to be looked at
        offsets = encode_boxes(torch.tensor([0.5, 0.5, 0.4, 0.4]).expand(len(priors), 4), priors)[None]
    capped = postprocess(offsets, logits, priors, [(375, 500)])
    monkeypatch.setattr(model_module, "FIRST_CANDIDATES", 10**9)
    everything = postprocess(offsets, logits, priors, [(375, 500)])
    assert len(everything[0]["scores"]) == (5 if kind == "one place" else 200)
    assert all(torch.equal(capped[0][name], everything[0][name]) for name in capped[0])


@pytest.mark.parametrize("name", ["offsets", "logits"])
def test_outputs_that_are_nan_are_an_error_and_no_empty_scene(name):
    offsets, logits, priors = next(decoding_cases(1, 10))
    {"offsets": offsets, "logits": logits}[name][0, 3, 1] = math.nan
    with pytest.raises(InputError, match="outputs are NaN"):
        postprocess(offsets, logits, priors, [(10, 10)] * 2)


def test_outputs_of_other_priors_are_an_error():
    offsets, logits, priors = next(decoding_cases(1, 10))
    with pytest.raises(InputError, match="10 outputs for 9 priors"):
        postprocess(offsets, logits, priors[:9], [(10, 10)] * 2)


def test_nothing_above_min_score():
    offsets, logits, priors = next(decoding_cases(1, 10))
    (result, _) = postprocess(offsets, logits, priors, [(10, 10)] * 2, min_score=1.0)
    assert {name: tuple(value.shape) for name, value in result.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoint_loads_in_a_fresh_process(tmp_path, small_model):
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    save_checkpoint(tmp_path / "c.pth.tar", small_model, step=3)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, model; from pathlib import Path; d = Path(sys.argv[1]);"
        "c = torch.load(d / 'c.pth.tar'); m = c['model']; assert not m.training and c['step'] == 3;"
        "assert m.config.classes == ('cat', 'dog') and model.last_loaded_model() is m;"
        "torch.save(m(torch.load(d / 'images.pt')), d / 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    offsets, logits = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        expected = small_model(images)
    assert torch.equal(offsets, expected[0])
    assert torch.equal(logits, expected[1])


def test_half_precision_files_load_as_float32(tmp_path, small_model):
    import copy

    save_checkpoint(tmp_path / "half.pth.tar", copy.deepcopy(small_model).half())
    loaded = load_checkpoint(tmp_path / "half.pth.tar")["model"]
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.priors.dtype == torch.float32


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


class CallsBuildModel:
    def __init__(self, config, state):
        self.arguments = config, state

    def __reduce__(self):
        return model_module.build_model, self.arguments


def hostile_config(**changes):
    from dataclasses import asdict

    return {**asdict(small_config()), **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": "hf-hub:someone/model"}, "plain timm name"),
        ({"backbone": "../../etc"}, "plain timm name"),
        ({"backbone": "local-dir:/tmp/x"}, "plain timm name"),
        ({"backbone": "no_such_backbone"}, "has no model"),
        ({"image_size": 10**9}, "image_size is 1000000000"),
        ({"image_size": 300.0}, "image_size"),
        ({"fpn_channels": 10**9}, "fpn_channels"),
        ({"fpn_channels": 2048}, "tensors do not fit"),
        ({"classes": tuple(map(str, range(20_000)))}, "classes must be"),
        ({"level_sides": ((10**6, 10**6),) * 7}, "level_sides must be pairs"),
        ({"prior_shapes": (((0.1, float("nan")),),) * 7}, "prior_shapes must be pairs"),
        ({"prior_shapes": (((0.1, 0.1),) * 10**5,) * 7}, "prior_shapes must be lists"),
        ({"fpn": "os:system"}, "fpn 'os:system' is not one of"),
        ({"aspect_ratios": ((2,) * 10**5,) * 7}, "aspect ratios"),
        ({"format_version": 99}, "format version 99"),
        ({"pretrained": True}, "unknown fields"),
    ],
)
def test_hostile_configs_are_refused(changes, said, tmp_path, small_model):
    torch.save({"model": CallsBuildModel(hostile_config(**changes), small_model.state_dict())}, tmp_path / "c.pth.tar")
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "c.pth.tar")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"model": RunsCode(str(marker))}, tmp_path / "zip.pth.tar")
    (tmp_path / "plain.pth.tar").write_bytes(pickle.dumps({"model": RunsCode(str(marker))}))
    for name in ("zip", "plain"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / f"{name}.pth.tar")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "zip.pth.tar")
    assert not marker.exists()


def test_what_is_no_checkpoint_is_named(tmp_path, small_model):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_checkpoint(tmp_path / "absent.pth.tar")
    (tmp_path / "text.pth.tar").write_text("hello")
    torch.save({"model": small_model.state_dict()}, tmp_path / "tensors.pth.tar")
    save_checkpoint(tmp_path / "whole.pth.tar", small_model)
    whole = (tmp_path / "whole.pth.tar").read_bytes()
    (tmp_path / "cut.pth.tar").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "tensors", "cut"):
        with pytest.raises(CheckpointError, match=f"{name}.pth.tar"):
            load_checkpoint(tmp_path / f"{name}.pth.tar")


def test_a_failed_save_leaves_the_old_file(tmp_path, small_model):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(path, small_model, step=1)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint(path, small_model, step=lambda: None)
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["c.pth.tar"]


@pytest.mark.parametrize("share", [0.75, 0.99])
def test_class_scores_start_from_background(share):
    model = FPNSSD(small_config())
    model.init_class_bias(share)
    for head in model.class_heads:
        scores = head.bias.view(-1, 3).softmax(dim=1)
        torch.testing.assert_close(scores, torch.tensor([[share, (1 - share) / 2, (1 - share) / 2]]).expand_as(scores))
