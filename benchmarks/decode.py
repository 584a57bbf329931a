"""Decoding an untrained network's answer, beside torchvision's SSD post-processing of the same scores.

    python -m benchmarks.decode

An untrained network is the worst case: nearly every (prior, class) pair is above the score threshold. torchvision keeps
the best 400 of each class before suppression, which can change the answer; ours gives the answer without any cap.
"""

import argparse
import statistics
import time

import torch
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_convert

from model import FPNSSD, ModelConfig, postprocess


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="each way's turns (5)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    classes = tuple(f"class {k}" for k in range(20))
    model = FPNSSD(ModelConfig(classes, "resnet18")).eval()
    images = torch.randint(0, 256, (args.images, 3, 300, 300), dtype=torch.uint8)
    with torch.no_grad():
        offsets, logits = model(images)
    sizes = [(375, 500)] * args.images
    # The same thresholds for both: score 0.01, IoU 0.45, 200 detections; 400 candidates a class are torchvision's.
    theirs = ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=21, score_thresh=0.01, nms_thresh=0.45, detections_per_img=200
    )
    theirs.box_coder.weights = (10.0, 10.0, 5.0, 5.0)  # SSD's variances 0.1 and 0.2
    anchors = box_convert(model.priors, "cxcywh", "xyxy") * torch.tensor([500.0, 375.0, 500.0, 375.0])
    outputs = {"bbox_regression": offsets, "cls_logits": logits}
    ways = {
        "torchvision's": lambda: theirs.postprocess_detections(outputs, [anchors] * args.images, sizes),
        "ours": lambda: postprocess(offsets, logits, model.priors, sizes),
    }
    seconds = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(args.rounds + 1):  # the first warms up
            for name, way in ways.items():
                start = time.perf_counter()
                results = way()
                if turn:
                    seconds[name].append((time.perf_counter() - start) / args.images)
                assert all(len(result["scores"]) == 200 for result in results)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    above = (logits.softmax(dim=2)[..., 1:] > 0.01).float().mean()
    print(
        f"{len(model.priors)} priors, 20 classes, {100 * above:.0f} % of the pairs above 0.01, {args.threads} threads"
    )
    for name, median in medians.items():
        print(f"{name:14} {1e3 * median:7.1f} ms an image")
    theirs_median, our_median = medians.values()
    print(f"ratio {theirs_median / our_median:.2f}")


if __name__ == "__main__":
    main()
