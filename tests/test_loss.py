"""Matching against a slow, obvious loop; mining and both losses against cases worked by hand."""

import math

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou_loss

from fpnssd.training.loss import (
    IGNORED,
    MultiBoxLoss,
    assign_atss,
    focal_class_loss,
    giou_box_loss,
    match,
    quality_class_loss,
)
from model import FPNSSD, ModelConfig, decode_offsets, encode_boxes, make_priors
from utils import InputError


def make_batch(images):
    """images: lists of (xyxy in 0..1, label, difficult, crowd) -> a padded batch."""
    most = max((len(objects) for objects in images), default=0)
    batch = {
        "boxes_norm": torch.zeros(len(images), most, 4),
        "labels": torch.zeros(len(images), most, dtype=torch.long),
        "difficult": torch.zeros(len(images), most, dtype=torch.bool),
        "crowd": torch.zeros(len(images), most, dtype=torch.bool),
    }
    for i, objects in enumerate(images):
        for n, (box, label, difficult, crowd) in enumerate(objects):
            batch["boxes_norm"][i, n] = torch.tensor(box)
            batch["labels"][i, n] = label
            batch["difficult"][i, n] = difficult
            batch["crowd"][i, n] = crowd
    return batch


def loss_of_batch(loss, offsets, logits, batch):
    """The terms, divided by the positives of this batch alone."""
    matches = loss.match(batch)
    return loss(offsets, logits, batch, matches, matches.num_positives.clamp(min=1))


def overlap_32(a, b):
    """IoU in float32 like torch's, from plain arithmetic on tensors of one number each."""
    side = [torch.minimum(a[k + 2], b[k + 2]) - torch.maximum(a[k], b[k]) for k in (0, 1)]
    intersection = side[0].clamp(min=0) * side[1].clamp(min=0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return (intersection / union).item(), intersection.item()


def slow_match(priors, objects, min_overlap=0.5):
    """One image, pair by pair: (label of each prior, object of each prior or None)."""
    corners = [torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) for cx, cy, w, h in priors.tolist()]
    boxes = [torch.tensor(box) for box, *_ in objects]
    wanted = [n for n, (_, _, _, crowd) in enumerate(objects) if not crowd]
    overlap = {(n, p): overlap_32(boxes[n], corners[p])[0] for n in wanted for p in range(len(priors))}
    owner = [None] * len(priors)
    for p in range(len(priors)):
        best = max(wanted, key=lambda n: (overlap[n, p], -n), default=None)
        if best is not None and overlap[best, p] >= min_overlap:
            owner[p] = best
    free_objects, free_priors = set(wanted), set(range(len(priors)))
    while free_objects and free_priors:
        n, p = max(((n, p) for n in free_objects for p in free_priors), key=lambda np: (overlap[np], -np[0], -np[1]))
        owner[p] = n
        free_objects.remove(n)
        free_priors.remove(p)
    labels = [0 if n is None else objects[n][1] for n in owner]
    for n, (_, _, _, crowd) in enumerate(objects):
        overlaps = [overlap_32(boxes[n], corner) for corner in corners]
        best = max(range(len(priors)), key=lambda p: (overlaps[p][0], -p))
        for p, (iou, intersection) in enumerate(overlaps):
            area = (corners[p][2] - corners[p][0]) * (corners[p][3] - corners[p][1])
            near = intersection / area >= 0.5 or iou >= min_overlap or (p == best and iou > 0)
            if crowd and owner[p] is None and near:
                labels[p] = IGNORED
    return labels, owner


def random_objects(generator, count, grid):
    """Boxes with corners on a coarse grid, so that equal overlaps are common."""
    objects = []
    for _ in range(count):
        x, y = torch.randint(0, grid - 1, (2,), generator=generator).tolist()
        w, h = torch.randint(1, grid // 2, (2,), generator=generator).tolist()
        box = (x / grid, y / grid, min(x + w, grid) / grid, min(y + h, grid) / grid)
        label, chance = torch.randint(1, 4, (1,), generator=generator).item(), torch.rand(1, generator=generator).item()
        objects.append((box, label, False, chance < 0.15))
    return objects


@pytest.mark.parametrize("cases", [40, pytest.param(1500, marks=pytest.mark.long)])
def test_match_equals_the_slow_loop(cases):
    generator = torch.Generator().manual_seed(0)
    grid = 8  # a power of two: coordinates, areas and ties are exact in float32
    for _ in range(cases):
        side = 2 ** torch.randint(1, 3, (1,), generator=generator).item()
        cells = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(cells, cells, indexing="ij")
        shapes = torch.tensor([(0.25, 0.25), (0.5, 0.25), (0.25, 0.5)])
        centres = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, 3, -1)
        priors = torch.cat([centres, shapes.expand(len(centres), -1, -1)], dim=-1).reshape(-1, 4)
        counts = torch.randint(0, 7, (3,), generator=generator).tolist()
        images = [random_objects(generator, count, grid) for count in counts]
        labels, matched = match(priors, make_batch(images))
        for i, objects in enumerate(images):
            expected_labels, owner = slow_match(priors, objects)
            assert labels[i].tolist() == expected_labels
            assert [m if n is not None else None for m, n in zip(matched[i].tolist(), owner, strict=True)] == owner


def test_more_objects_than_priors_leaves_some_without():
    priors = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
    box = (0.0, 0.0, 0.5, 1.0)
    labels, _ = match(priors, make_batch([[(box, 1, 0, 0), (box, 2, 0, 0), (box, 3, 0, 0)]]))
    assert labels.tolist() == [[1, 2]]  # the lower objects came first, the second took what was left


def test_difficult_objects_are_positive_or_ignored():
    priors = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    batch = make_batch([[((0.0, 0.0, 0.5, 0.5), 2, True, False)]])
    assert match(priors, batch)[0].tolist() == [[2, 0]]
    assert match(priors, batch, difficult_positive=False)[0].tolist() == [[IGNORED, 0]]
    small = make_batch([[((0.1, 0.1, 0.2, 0.2), 2, True, False)]])  # the prior that would detect it
    assert match(priors, small, difficult_positive=False)[0].tolist() == [[IGNORED, 0]]


def test_batch_without_any_object():
    priors = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    labels, matched = match(priors, make_batch([[], []]))
    assert labels.tolist() == matched.tolist() == [[0], [0]]


# Four priors in a row; the first matches the object exactly.
ROW = torch.tensor([[0.125, 0.5, 0.25, 1.0], [0.375, 0.5, 0.25, 1.0], [0.625, 0.5, 0.25, 1.0], [0.875, 0.5, 0.25, 1.0]])
OBJECT = ((0.0, 0.0, 0.25, 1.0), 1, False, False)


def logits_with_losses(background_losses):
    """Two-class logits (1, P, 2) whose cross-entropy for class 0 is as given."""
    probabilities = [math.exp(-loss) for loss in background_losses]
    return torch.tensor([[[math.log(p), math.log(1 - p)] for p in probabilities]])


def test_mining_by_hand():
    # Positive: prior 0, p(object) = 1 - exp(-0.1). Negatives 2.0, 1.0, 0.5: with ratio 2 the first two are mined.
    logits = logits_with_losses([0.1, 0.5, 2.0, 1.0])
    positive_loss = -math.log(1 - math.exp(-0.1))
    loss = MultiBoxLoss(ROW, negative_ratio=2, min_negatives=1)
    terms = loss_of_batch(loss, torch.zeros(1, 4, 4), logits, make_batch([[OBJECT]]))
    assert terms["class"].item() == pytest.approx(positive_loss + 2.0 + 1.0, abs=1e-5)
    # The configured minimum takes over where the ratio asks for less, and all negatives where there are no more.
    for min_negatives, expected in ((3, 3.5), (100, 3.5)):
        loss = MultiBoxLoss(ROW, negative_ratio=1, min_negatives=min_negatives)
        terms = loss_of_batch(loss, torch.zeros(1, 4, 4), logits, make_batch([[OBJECT]]))
        assert terms["class"].item() == pytest.approx(positive_loss + expected, abs=1e-5)


def test_image_without_objects_teaches_background():
    logits = logits_with_losses([0.1, 0.5, 2.0, 1.0]).requires_grad_()
    offsets = torch.zeros(1, 4, 4, requires_grad=True)
    terms = loss_of_batch(MultiBoxLoss(ROW, min_negatives=2), offsets, logits, make_batch([[]]))
    assert terms["class"].item() == pytest.approx(3.0, abs=1e-5)  # divided by at least 1
    assert terms["box"].item() == 0
    (terms["class"] + terms["box"]).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(offsets.grad).all()


def test_crowds_are_neither_positive_nor_mined():
    # The crowd covers prior 1 and three fifths of prior 2 (IoU under a half with each), and nothing of prior 3.
    crowd = ((0.25, 0.0, 0.65, 1.0), 1, False, True)
    labels, _ = match(ROW, make_batch([[OBJECT, crowd]]))
    assert labels.tolist() == [[1, IGNORED, IGNORED, 0]]
    logits = logits_with_losses([0.1, 5.0, 6.0, 1.0])
    terms = loss_of_batch(MultiBoxLoss(ROW), torch.zeros(1, 4, 4), logits, make_batch([[OBJECT, crowd]]))
    assert terms["class"].item() == pytest.approx(-math.log(1 - math.exp(-0.1)) + 1.0, abs=1e-5)


def test_box_loss_by_hand():
    # Off by 0.4 (quadratic part: 0.08) and by 3 (linear part: 2.5); priors without an object count nothing.
    offsets = torch.full((1, 4, 4), 7.0)
    offsets[0, 0] = encode_boxes(torch.tensor([0.125, 0.5, 0.25, 1.0]), ROW[0]) + torch.tensor([0.4, 0.0, -3.0, 0.0])
    terms = loss_of_batch(MultiBoxLoss(ROW), offsets, torch.zeros(1, 4, 2), make_batch([[OBJECT]]))
    assert terms["box"].item() == pytest.approx(0.08 + 2.5, abs=1e-5)


def test_loss_of_a_batch_is_that_of_its_images():
    """Both normalised by the batch's positives: padding one image to the length of another changes nothing."""
    generator = torch.Generator().manual_seed(1)
    priors = torch.rand(50, 4, generator=generator) * 0.5 + 0.1
    images = [random_objects(generator, count, 8) for count in (5, 0, 2)]
    offsets, logits = torch.randn(3, 50, 4, generator=generator), torch.randn(3, 50, 4, generator=generator)
    loss = MultiBoxLoss(priors)
    together = loss_of_batch(loss, offsets, logits, make_batch(images))
    positives, sums = 0, {"box": 0.0, "class": 0.0}
    for i in range(3):
        alone = make_batch(images[i : i + 1])
        count = int((match(priors, alone)[0] > 0).sum())
        for name, value in loss_of_batch(loss, offsets[i : i + 1], logits[i : i + 1], alone).items():
            sums[name] += value.item() * max(1, count)
        positives += count
    for name in sums:
        assert together[name].item() == pytest.approx(sums[name] / positives, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The other losses and the other matching


def plain_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_giou_by_hand():
    """The prior is 0.4 wide and high; the object lies 0.2 to its right: IoU 1/3."""
    priors = torch.tensor([[0.3, 0.5, 0.4, 0.4]])
    wanted = torch.tensor([[[0.5, 0.5, 0.4, 0.4]]])
    still, exact = torch.zeros(1, 1, 4), encode_boxes(wanted, priors)
    # They fill the box around both, 0.6 x 0.4, so GIoU is IoU.
    assert giou_box_loss(still, wanted, priors).item() == pytest.approx(1 - 1 / 3, abs=1e-4)
    # 0.6 to the right: no overlap, a gap of a fifth of the box around both.
    apart = torch.tensor([[[0.9, 0.5, 0.4, 0.4]]])
    assert giou_box_loss(still, apart, priors).item() == pytest.approx(1 + 0.2, abs=1e-4)
    assert giou_box_loss(exact, wanted, priors).item() == pytest.approx(0, abs=1e-4)


def test_giou_is_torchvisions():
    """Values and gradients, on random pairs, apart and overlapping; torchvision's are in pixels."""
    generator = torch.Generator().manual_seed(0)
    priors = torch.rand(200, 4, generator=generator) * 0.4 + 0.2
    wanted = (torch.rand(1, 200, 4, generator=generator) * 0.4 + 0.2).double()
    offsets = torch.randn(1, 200, 4, generator=generator).double()
    ours, theirs = offsets.clone().requires_grad_(), offsets.clone().requires_grad_()
    in_pixels = [box_convert(b * 300, "cxcywh", "xyxy") for b in (decode_offsets(theirs, priors), wanted)]
    losses = giou_box_loss(ours, wanted, priors), generalized_box_iou_loss(*in_pixels)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_focal_loss_by_hand():
    # One object with p = 0.8, one background with p = 0.6, one ignored.
    logits = torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]]).log()
    labels = torch.tensor([[1, 0, IGNORED]])
    expected = 0.25 * 0.2**2 * -math.log(0.8) + 0.75 * 0.4**2 * -math.log(0.6)
    assert focal_class_loss(logits, labels, None).item() == pytest.approx(expected, rel=1e-5)
    # Without focus and with equal weights it is half of the cross-entropy.
    plain = focal_class_loss(logits, labels, None, gamma=0.0, alpha=0.5).item()
    assert plain == pytest.approx((-math.log(0.8) - math.log(0.6)) / 2, rel=1e-5)


def test_quality_loss_by_hand():
    logits = torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]]).log()
    labels, quality = torch.tensor([[1, 0, IGNORED]]), torch.tensor([[0.5, 0.9, 0.1]])  # the last two mean nothing
    of_object = 0.3**2 * (-0.5 * math.log(0.8) - 0.5 * math.log(0.2))
    of_background = 0.4**2 * -math.log(0.6)
    assert quality_class_loss(logits, labels, quality).item() == pytest.approx(of_object + of_background, rel=1e-5)
    # Where the score is the quality, and background sure of itself, there is nothing to learn.
    sure = torch.tensor([[[0.3, 0.7], [1.0, 0.0]]]).clamp(min=1e-12).log()
    quiet = quality_class_loss(sure, torch.tensor([[1, 0]]), torch.tensor([[0.7, 0.0]]))
    assert quiet.item() == pytest.approx(0, abs=1e-6)


def test_the_quality_is_that_of_the_predicted_boxes():
    loss = MultiBoxLoss(ROW, class_loss="quality")
    offsets = torch.zeros(1, 4, 4)
    offsets[0, 0] = encode_boxes(torch.tensor([0.175, 0.5, 0.25, 1.0]), ROW[0])  # 0.2 of its width to the right
    batch = make_batch([[OBJECT]])
    boxes = loss.box_targets(batch["boxes_norm"], loss.match(batch))
    assert loss.quality(offsets, boxes)[0, 0].item() == pytest.approx(0.8 / 1.2, abs=1e-5)
    assert loss.quality(offsets, boxes)[0, 1].item() == 1  # a prior without an object aims at itself


COMBINATIONS = [
    ("smooth_l1", "ohem", "multibox"), ("giou", "focal", "atss"), ("giou", "quality", "multibox"),
    ("smooth_l1", "quality", "atss"), ("giou", "ohem", "multibox"), ("smooth_l1", "focal", "atss"),
]  # fmt: skip


@pytest.mark.parametrize(("box_loss", "class_loss", "matching"), COMBINATIONS)
def test_losses_and_matchings_learn_and_survive_emptiness(box_loss, class_loss, matching):
    torch.manual_seed(0)
    config = ModelConfig(("a", "b"), "resnet18", image_size=64, fpn_channels=16)
    priors, counts = (getattr(FPNSSD(config), name) for name in ("priors", "level_counts"))
    loss = MultiBoxLoss(priors, counts, matching, box_loss, class_loss)
    batch = make_batch(
        [[((0.1, 0.1, 0.5, 0.6), 1, 0, 0), ((0.6, 0.5, 0.7, 0.6), 2, 0, 0)], [], [((0, 0, 1, 1), 2, 0, 1)]]
    )
    offsets = torch.zeros(3, len(priors), 4, requires_grad=True)
    logits = torch.zeros(3, len(priors), 3, requires_grad=True)
    optimizer = torch.optim.Adam([offsets, logits], lr=0.05)
    values = []
    for _ in range(200):
        total = sum(loss_of_batch(loss, offsets, logits, batch).values())
        optimizer.zero_grad()
        total.backward()
        assert torch.isfinite(offsets.grad).all()
        assert torch.isfinite(logits.grad).all()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.5 * values[0]
    empty = loss_of_batch(loss, offsets, logits, make_batch([[], [], []]))
    assert all(math.isfinite(term.item()) for term in empty.values())


def slow_atss(priors, level_counts, box, nearest=9):
    """Which priors ATSS allows for one box: level by level, pair by pair."""
    corners = [(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in priors.tolist()]
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    candidates, begin = [], 0
    for count, per_cell in level_counts:
        of_level = range(begin, begin + count)
        by_distance = sorted(of_level, key=lambda p: math.dist(priors[p, :2].tolist(), centre))
        candidates += by_distance[: nearest * per_cell]
        begin += count
    overlaps = [plain_iou(corners[p], box) for p in candidates]
    mean = sum(overlaps) / len(overlaps)
    threshold = mean + math.sqrt(sum((o - mean) ** 2 for o in overlaps) / (len(overlaps) - 1))
    inside = [box[0] < priors[p, 0] < box[2] and box[1] < priors[p, 1] < box[3] for p in range(len(priors))]
    return {p for p, overlap in zip(candidates, overlaps, strict=True) if overlap >= threshold and inside[p]}


def test_atss_equals_the_slow_loop():
    generator = torch.Generator().manual_seed(2)
    priors = make_priors(ModelConfig(("a",)), [(side, side) for side in (12, 6, 3, 2, 1, 1, 1)])
    counts = [
        (side * side * per_cell, per_cell)
        for side, per_cell in zip((12, 6, 3, 2, 1, 1, 1), (4, 6, 6, 6, 4, 4, 4), strict=True)
    ]
    for _ in range(10):
        # Off any grid, so that no two priors of different cells are equally far away.
        corner, sides = torch.rand(2, generator=generator) * 0.6, torch.rand(2, generator=generator) * 0.35 + 0.05
        box = (*corner.tolist(), *(corner + sides).tolist())
        batch = make_batch([[(box, 1, False, False)]])
        loss = MultiBoxLoss(priors, counts, matching="atss")
        labels, _ = loss.match(batch)
        expected = slow_atss(priors, counts, box)
        found = set(labels[0].nonzero().squeeze(1).tolist())
        # Besides, the prior that overlaps the object most is its own in any case.
        assert found - expected <= {int((labels[0] * best_overlaps(priors, box)).argmax())}
        assert expected <= found


def best_overlaps(priors, box):
    corners = [(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in priors.tolist()]
    return torch.tensor([plain_iou(corner, box) for corner in corners])


def test_atss_gives_small_objects_more_priors():
    """A 20-pixel object overlaps no prior of 30 pixels and more by a half: SSD's rule leaves it the forced one."""
    priors = make_priors(ModelConfig(("a",)), [(side, side) for side in (38, 19, 10, 5, 3, 2, 1)])
    counts = [(side * side * n, n) for side, n in zip((38, 19, 10, 5, 3, 2, 1), (4, 6, 6, 6, 4, 4, 4), strict=True)]
    batch = make_batch([[((0.5, 0.5, 0.5 + 20 / 300, 0.5 + 20 / 300), 1, False, False)]])
    positives = {
        m: int(MultiBoxLoss(priors, counts, matching=m).match(batch).num_positives) for m in ("multibox", "atss")
    }
    assert positives["multibox"] == 1
    assert positives["atss"] >= 2


def test_atss_takes_the_lower_prior_of_equals_on_every_device():
    """A box centred between four cells: of the cells that are equally far, those of lower index are candidates."""
    side, per_cell = 6, 3
    cells = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(cells, cells, indexing="ij")
    shapes = torch.tensor([(0.2, 0.2), (0.3, 0.2), (0.2, 0.3)])
    centres = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, per_cell, -1)
    priors = torch.cat([centres, shapes.expand(len(centres), -1, -1)], dim=-1).reshape(-1, 4)
    box = torch.tensor([[[0.25, 0.25, 0.75, 0.75]]])
    distances = (priors[:, :2] - 0.5).square().sum(dim=1).tolist()
    expected = sorted(range(len(priors)), key=lambda p: (distances[p], p))[: 2 * per_cell]
    # IoU 1 for the candidates that are expected and 0 for the others: all of them reach the mean, which is then 1.
    iou = torch.zeros(1, 1, len(priors))
    iou[0, 0, expected] = 1.0
    allowed = assign_atss(iou, box, priors, [(len(priors), per_cell)], nearest=2)
    assert set(allowed[0, 0].nonzero().squeeze(1).tolist()) == set(expected)


@pytest.mark.parametrize("name", ["matching", "box_loss", "class_loss"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(InputError, match=f"{name} 'ATSS' is not one of"):
        MultiBoxLoss(ROW, [(4, 1)], **{name: "ATSS"})


def test_giou_of_enormous_offsets_is_finite():
    """Sizes are clamped before exp, as torchvision does: e to the 100th is infinite in float32."""
    offsets = torch.full((1, 4, 4), 500.0, requires_grad=True)
    loss = MultiBoxLoss(ROW, box_loss="giou", class_loss="quality")
    terms = loss_of_batch(loss, offsets, torch.zeros(1, 4, 2), make_batch([[OBJECT]]))
    (terms["box"] + terms["class"]).backward()
    assert math.isfinite(terms["box"].item())
    assert torch.isfinite(offsets.grad).all()


def test_resnet50_learns_a_fixed_batch():
    torch.manual_seed(0)
    model = FPNSSD(ModelConfig(classes=("a", "b"), image_size=64), backbone_weights="none")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    batch = make_batch(
        [[((0.1, 0.1, 0.5, 0.6), 1, 0, 0), ((0.6, 0.5, 0.7, 0.6), 2, 0, 0)], [((0, 0, 0.9, 0.9), 2, 0, 0)]]
    )
    loss = MultiBoxLoss(model.priors)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    values = []
    for _ in range(10):
        terms = loss_of_batch(loss, *model(images), batch)
        total = terms["box"] + terms["class"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert sum(values[-3:]) < 0.9 * sum(values[:3])
