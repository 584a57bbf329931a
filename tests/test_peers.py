"""torchvision's detectors on our backbone: what was fitted to 300 pixels, labels, and runs that are stopped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList

import experiments.peers
from experiments.accuracy import chosen
from fpnssd.data.data_list import DataList
from fpnssd.training.config import lite

NAMES = ("torchvision_ssd", "torchvision_retinanet", "torchvision_fcos")


@pytest.fixture
def peers():
    return experiments.peers


@pytest.fixture
def config():
    tiny = {"backbone": "test_resnet", "backbone_weights": "none", "fpn_channels": 32, "frozen_stages": 0}
    return replace(lite(), **tiny, epochs=2, batch_size=6, warmup_steps=2)


# SSD's of the paper: 4, 6, 6, 6, 4, 4 boxes on sides of 38 to 1. The others pad 300 to 320.
@pytest.mark.parametrize(
    ("name", "sides", "boxes", "first"),
    [
        ("torchvision_ssd", (38, 19, 10, 5, 3, 1), 8732, [-6.6, -6.6, 14.4, 14.4]),  # 0.07 of 300, around (3.9, 3.9)
        ("torchvision_retinanet", (40, 20, 10, 5, 3), 9 * 2134, [-13, -4, 21, 12]),  # 24 x 24 made twice as wide
        ("torchvision_fcos", (40, 20, 10, 5, 3), 2134, [2, 2, 6, 6]),  # a point, with the unit of its distances
    ],
)
def test_boxes_lie_where_the_maps_see(peers, config, name, sides, boxes, first):
    model = peers.PEERS[name](3, config).eval()
    side = 300 if name == "torchvision_ssd" else 320
    with torch.no_grad():
        maps = list(model.backbone(torch.zeros(1, 3, side, side)).values())
    assert [one.shape[-1] for one in maps] == list(sides)
    (anchors,) = model.anchor_generator(ImageList(torch.zeros(1, 3, side, side), [(side, side)]), maps)
    assert anchors.shape == (boxes, 4)
    torch.testing.assert_close(anchors[0], torch.tensor(first, dtype=torch.float32), atol=0.06, rtol=0)
    middles = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert middles.min() > 0
    assert middles.max() < side + 32  # a map of 3 cells of 128 px reaches beyond 320


def test_distances_of_fcos_start_alive(peers, config):
    """They end in a ReLU: what is 0 for all images learns no more."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = peers.PEERS["torchvision_fcos"](3, config)
        maps = [torch.rand(2, 32, side, side) for side in (40, 20, 10, 5, 3)]
        with torch.no_grad():
            distances, _ = model.head.regression_head(maps)
        assert (distances > 0.5).float().mean() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_the_list(peers, drawn, name):
    data_list = DataList.load(drawn / "train.json")
    dataset = peers.PeerDataset(data_list, peers.AUGMENTATIONS[name], seed=0)
    for index in range(len(dataset)):
        image, target = dataset[0, index, 0]
        assert image.shape == (3, 300, 300)
        assert 0 <= image.min() < image.max() <= 1
        boxes, labels = target["boxes"].as_subclass(torch.Tensor), target["labels"]
        expected = data_list.target(index)["labels"].tolist()
        if name == "torchvision_ssd":  # crops drop objects
            assert set(labels.tolist()) <= set(expected)
        else:
            assert labels.tolist() == expected  # 1 is the first class
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((boxes >= 0) & (boxes <= 300)).all()
        again, same = dataset[0, index, 0]
        assert torch.equal(image, again)
        assert torch.equal(boxes, same["boxes"].as_subclass(torch.Tensor))


def test_what_is_found_is_in_the_photograph_and_never_nothing(peers):
    """A photograph 400 wide and 200 high, seen as 300 x 300; label 0 is a sigmoid head's own."""

    class Stub(torch.nn.Module):
        def forward(self, images):
            assert images[0].max() == 1
            boxes = torch.tensor([[30.0, 60, 150, 300], [0, 0, 300, 300]])
            return [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([2, 0])}]

    images = torch.full((1, 3, 300, 300), 255, dtype=torch.uint8)
    (found,) = peers.PeerPredictor(Stub())(images, [(200, 400)])
    assert found["boxes"].tolist() == [[40, 40, 200, 200]]
    assert found["labels"].tolist() == [2]
    assert np.allclose(found["scores"], 0.9)


@pytest.mark.parametrize("name", NAMES)
def test_stopped_in_its_second_epoch_it_ends_the_same(peers, config, drawn, in_tmp, monkeypatch, name):
    content = chosen(json.loads((drawn / "train.json").read_text()), lambda image_id: image_id <= 4)
    Path("four.json").write_text(json.dumps(content))
    data_list, config = DataList.load("four.json"), replace(config, batch_size=2)
    assert len(data_list) == 4
    for folder in ("straight", "stopped"):
        Path(folder).mkdir()
    straight, _ = peers.train_peer(name, config, data_list, Path("straight"))
    train_step, calls = peers.train_step, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(peers, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        peers.train_peer(name, config, data_list, Path("stopped"))
    monkeypatch.setattr(peers, "train_step", train_step)
    other, _ = peers.train_peer(name, config, data_list, Path("stopped"))
    torch.testing.assert_close(other.model.state_dict(), straight.model.state_dict(), rtol=0, atol=0)
    assert len(calls) == 4
