"""torchvision's SSD, RetinaNet and FCOS on our backbone: their heads, losses, matching and augmentation.

What they share with ours: backbone and its weights, what of it is frozen, the number of images seen, optimizer, rates,
schedule, averaged weights, 300 pixels, how many detections are kept, evaluation. FPNs are as wide as ours. RetinaNet
is torchvision's second version. What is made for 800 pixels or for another backbone is fitted to 300 and to ours:
sizes of anchors, where they lie in a cell, and what lies between the backbone's maps and what reads them. Rates are
those that suit our heads, unless accuracy.py is told others (NAME+half_lr).
"""

import time
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import v2

from datasets import EpochSampler
from fpnssd.data.augment import FILL
from fpnssd.training.optim import EMA, freeze, lr_factor, set_train_mode
from model import build_backbone
from utils import atomic_write

SIDE = 300
DECODING = {"score_thresh": 0.01, "detections_per_img": 200}  # eval.py's; the overlap of NMS is each one's own


def train_peer(name, config, train_list, folder):
    """(predict_fn of the averaged weights, minutes of training) after config.epochs; goes on where it was stopped."""
    torch.manual_seed(config.seed)
    model = PEERS[name](len(train_list.classes), config).to(memory_format=torch.channels_last)  # faster, no more
    freeze(model.backbone, config)
    ema = EMA(model, config.ema_decay)
    dataset = PeerDataset(train_list, AUGMENTATIONS[name], config.seed)
    steps = len(dataset) // config.batch_size
    sampler = EpochSampler(len(dataset), config.seed, limit=steps * config.batch_size)
    loader = torch.utils.data.DataLoader(
        dataset, config.batch_size, sampler=sampler, num_workers=config.workers, collate_fn=list
    )
    optimizer = make_optimizer(model, config)
    state_file, begun, minutes = folder / "peer.pth.tar", 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file)
        begun, minutes = state["epochs"], state["minutes"]
        for part, saved in ((model, "model"), (ema.module, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(state[saved])
        torch.set_rng_state(state["rng"])  # of which RetinaNet draws its scales
    for epoch in range(begun, config.epochs):
        start, sampler.epoch, total = time.perf_counter(), epoch, 0.0
        model.train()
        set_train_mode(model.backbone)
        for number, batch in enumerate(loader):
            step = epoch * steps + number
            total += train_step(model, optimizer, batch, lr_factor(step, config, config.epochs * steps), config)
            ema.update(model, step)
        minutes += (time.perf_counter() - start) / 60
        print(
            f"{folder.name}: epoch {epoch + 1}/{config.epochs}, loss {total / steps:.3f}, {minutes:.1f} min", flush=True
        )
        state = {"model": model.state_dict(), "ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_write(state_file) as temporary:
            about = {"epochs": epoch + 1, "minutes": minutes, "rng": torch.get_rng_state()}
            torch.save({**state, **about}, temporary)
    return PeerPredictor(ema.module), minutes


def train_step(model, optimizer, batch, factor, config):
    """The loss of a batch, a list of (image, target)."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    losses = model([image for image, _ in batch], [target for _, target in batch])
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if not (norm + loss.detach()).isfinite():
        raise RuntimeError(f"a loss of {loss.item()} with a gradient of {norm.item()}: this run is worth nothing")
    optimizer.step()
    return loss.item()


def make_optimizer(model, config):
    """AdamW with our rates: the backbone's share of it, no decay of biases and norms."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = config.lr * (config.backbone_lr_scale if ".backbone." in name else 1.0)
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            group = {"params": [], "lr": lr, "initial_lr": lr, "weight_decay": decay}
            groups.setdefault((lr, decay), group)["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=config.lr)


class PeerPredictor:
    """predict_fn for eval.predict: uint8 squares (B, 3, 300, 300) and sizes -> a dict of detections an image."""

    def __init__(self, model):
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, images, sizes):
        found = self.model(list(images.float() / 255))
        for one, (height, width) in zip(found, sizes, strict=True):
            one["boxes"] = one["boxes"] * torch.tensor([width, height, width, height]) / SIDE
        # Sigmoid heads have a score for class 0 too, which is nothing here.
        return [{name: one[name][one["labels"] > 0] for name in ("boxes", "scores", "labels")} for one in found]


# ---------------------------------------------------------------------------------------------------------------------
# Data


class PeerDataset(torch.utils.data.Dataset):
    """dataset[epoch, index, occurrence] -> (float image in 0..1, target), at 300 pixels; crowds are left out."""

    def __init__(self, data_list, transforms, seed):
        self.data_list, self.seed = data_list, seed
        finish = [v2.Resize((SIDE, SIDE)), v2.SanitizeBoundingBoxes(), v2.ToDtype(torch.float32, scale=True)]
        self.transforms = v2.Compose([v2.ToImage(), *transforms, *finish])

    def __len__(self):
        return len(self.data_list)

    def __getitem__(self, key):
        epoch, index, occurrence = key
        torch.manual_seed(hash((self.seed, epoch, index, occurrence)) % 2**63)
        target, image = self.data_list.target(index), self.data_list.read_image(index)
        wanted = ~target["crowd"]
        boxes = torch.from_numpy(target["boxes"][wanted]).reshape(-1, 4)
        given = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width)),
            "labels": torch.from_numpy(target["labels"][wanted]).long(),
        }
        return self.transforms(image, given)


FLIP = [v2.RandomHorizontalFlip()]
FULL = [
    v2.RandomPhotometricDistort(),
    v2.RandomZoomOut(fill=dict.fromkeys([tv_tensors.Image], FILL)),
    v2.RandomIoUCrop(),
    *FLIP,
]
AUGMENTATIONS = {"torchvision_ssd": FULL, "torchvision_retinanet": FLIP, "torchvision_fcos": FLIP}


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class SSDMaps(nn.Module):
    """C3, C4, C5 with 256 channels, and three maps more by SSD's extra layers: sides 38, 19, 10, 5, 3, 1.

    VGG's maps have passed a ReLU and have 512 channels and more; a small backbone's are the few outputs of linear
    layers, some frozen, which one layer of a head cannot make much of. So a layer that is trained comes between.
    """

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        channels = 256
        self.reads = nn.ModuleList(Conv2dNormActivation(c, channels, 1) for c in backbone.feature_info.channels())
        self.extras = nn.ModuleList()
        for out_channels, stride, padding in ((512, 2, 1), (256, 2, 1), (256, 1, 0)):
            down = Conv2dNormActivation(channels, out_channels // 2, 1)
            more = Conv2dNormActivation(out_channels // 2, out_channels, 3, stride, padding)
            self.extras.append(nn.Sequential(down, more))
            channels = out_channels

    def forward(self, images):
        maps = [read(one) for read, one in zip(self.reads, self.backbone(images), strict=True)]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return OrderedDict((str(number), one) for number, one in enumerate(maps))


class Pyramid(nn.Module):
    """torchvision's FPN over C3, C4, C5, with P6 of P5 (or of C5) and P7.

    It normalises, as ours: the backbone's maps differ in scale, and in the sum the finest would drown the others.
    """

    def __init__(self, backbone, out_channels, p6_of_c5):
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels
        channels = backbone.feature_info.channels()
        last = LastLevelP6P7(channels[-1] if p6_of_c5 else out_channels, out_channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, last, norm_layer=partial(nn.GroupNorm, 32))

    def forward(self, images):
        return self.fpn(OrderedDict((str(number), one) for number, one in enumerate(self.backbone(images))))


class CentredAnchors(AnchorGenerator):
    """Anchors in the middle of cells, as ours, where torchvision's lie in their corners."""

    def grid_anchors(self, grid_sizes, strides):
        corners = super().grid_anchors(grid_sizes, strides)
        return [one + torch.stack([x, y, x, y]) / 2 for one, (y, x) in zip(corners, strides, strict=True)]


def build(config):
    """(backbone, what a torchvision detector is told of images)"""
    backbone, mean, std = build_backbone(config.backbone, config.backbone_weights)
    in_unit = {"image_mean": [m / 255 for m in mean], "image_std": [s / 255 for s in std]}
    return backbone, in_unit


def make_ssd(num_classes, config):
    backbone, of_images = build(config)
    scales = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    anchors = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=scales)
    return SSD(SSDMaps(backbone), anchors, (SIDE, SIDE), num_classes + 1, **of_images, **DECODING)


def make_retinanet(num_classes, config):
    backbone, of_images = build(config)
    # From 32 by default. Objects in images of 300 are smaller, but half of it would leave few anchors to each.
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (24, 48, 96, 192, 384))
    anchors = CentredAnchors(sizes, ((0.5, 1.0, 2.0),) * 5)
    norm = partial(nn.GroupNorm, 32)
    head = RetinaNetHead(config.fpn_channels, anchors.num_anchors_per_location()[0], num_classes + 1, norm)
    head.regression_head._loss_type = "giou"
    # Its recipe draws sides of 480 to 800 for images of 800.
    size = {"min_size": tuple(SIDE * x // 800 for x in range(480, 801, 32)), "max_size": SIDE}
    pyramid = Pyramid(backbone, config.fpn_channels, p6_of_c5=True)
    return RetinaNet(pyramid, num_classes + 1, anchor_generator=anchors, head=head, **size, **of_images, **DECODING)


def make_fcos(num_classes, config):
    backbone, of_images = build(config)
    # A level is trained on objects of 4 to 8 of these sizes: half the default's, which reach to 1,024 pixels. Radii are
    # in these sizes too: 1.5 cells, as by default.
    anchors = CentredAnchors(tuple((x,) for x in (4, 8, 16, 32, 64)), ((1.0,),) * 5)
    size = {"min_size": SIDE, "max_size": SIDE}
    pyramid = Pyramid(backbone, config.fpn_channels, p6_of_c5=False)
    model = FCOS(
        pyramid, num_classes + 1, anchor_generator=anchors, center_sampling_radius=3.0, **size, **of_images, **DECODING
    )
    # Distances start at 1, as exp(0) of the paper's does: from torchvision's 0, on the edge of a ReLU, one of three
    # seeds died at either of two rates.
    nn.init.ones_(model.head.regression_head.bbox_reg.bias)
    return model


PEERS = {"torchvision_ssd": make_ssd, "torchvision_retinanet": make_retinanet, "torchvision_fcos": make_fcos}
