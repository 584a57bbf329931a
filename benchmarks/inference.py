"""How long an answer takes on a CPU: exported beside eager, by backbone, beside peers, and from the command line.

    python -m benchmarks.inference                       # networks with random weights: only time is looked at
    python -m benchmarks.inference --data data/vocreal   # OpenVINO in 8 bits too, calibrated on its training list

Ways of running one network take turns in one run, and medians are printed, so that ratios hold on a noisy machine.
Times are a picture's, of the network alone: uint8 squares in, offsets and logits out; of torchvision's detectors the
backbone and heads at the same number of pixels.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from export import export_onnx, export_openvino
from fpnssd.data.voc import VOC_CLASSES
from fpnssd.inference.detector import load_detector
from fpnssd.inference.runtimes import load_exported
from model import FPNSSD, ModelConfig, save_checkpoint

ROOT = Path(__file__).parents[1]
BACKBONES = {  # with the channels of their FPN
    "resnet50": 256,
    "tf_efficientnet_lite2": 128,
    "tf_efficientnet_lite1": 128,
    "tf_efficientnet_lite0": 128,
}
PEERS = {  # torchvision's, with the side they are made for; RetinaNet is made for 800 and gets ours
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
    "retinanet_resnet50_fpn_v2": 300,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of data lists, to calibrate 8 bits on")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way (7)")
    parser.add_argument("--only", nargs="+", choices=("exported", "backbones", "peers", "command"), help="parts (all)")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}")
    parts = {
        "exported": measure_exported,
        "backbones": measure_backbones,
        "peers": measure_peers,
        "command": measure_command,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in parts.items():
            if name in (args.only or parts):
                measure(Path(folder), args)


def take_turns(ways, rounds):
    """{name: median seconds of a call} of {name: function without arguments}, which take turns."""
    seconds = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if round_:  # the first is for warming up
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def noise(count, side):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def write_checkpoint(folder, backbone):
    torch.manual_seed(0)
    path = folder / f"{backbone}.pth.tar"
    save_checkpoint(path, FPNSSD(ModelConfig(VOC_CLASSES, backbone, fpn_channels=BACKBONES[backbone])))
    return path


def eager(model):
    """The network as anybody would run it: fp32, tensors as they come."""

    @torch.no_grad()
    def forward(squares):
        return model(squares)

    return forward


# ---------------------------------------------------------------------------------------------------------------------


def measure_exported(folder, args):
    print("\nResNet-50, ms a picture (times as fast as eager fp32); first use: converting, and loading what is there")
    checkpoint = write_checkpoint(folder, "resnet50")
    plain = torch.load(checkpoint)["model"]
    ways = {
        "eager fp32": eager(plain),
        "torch, as detect.py runs it": load_detector(checkpoint, runtime="torch").forward,
    }
    exports = {"ONNX Runtime": (export_onnx, "a.onnx", ()), "OpenVINO": (export_openvino, "a.xml", ())}
    if args.data:
        exports["OpenVINO, 8 bits"] = (export_openvino, "b.xml", (Path(args.data) / "train.json",))
    first_use = {}
    for name, (export, file_name, more) in exports.items():
        begin = time.perf_counter()
        export(checkpoint, folder / file_name, *more)
        middle = time.perf_counter()
        ways[name] = load_exported(folder / file_name).forward
        ways[name](noise(1, 300))
        first_use[name] = f"{middle - begin:.1f} s, {time.perf_counter() - middle:.1f} s"
    medians = {}
    for batch in (1, 8):
        squares = noise(batch, 300)
        medians[batch] = take_turns({name: lambda f=f, s=squares: f(s) for name, f in ways.items()}, args.rounds)
    print("| way | batch 1 | batch 8 | first use |\n|---|---|---|---|")
    for name in ways:
        columns = (
            f"{1000 * medians[b][name] / b:.1f} ({medians[b]['eager fp32'] / medians[b][name]:.1f} x)" for b in (1, 8)
        )
        print(f"| {name} | {' | '.join(columns)} | {first_use.get(name, '')} |")


def measure_backbones(folder, args):
    print("\nBackbone by backbone, batch 1, ms a picture")
    print("| backbone | FPN channels | parameters | multiply-adds | eager fp32 | OpenVINO |\n|---|---|---|---|---|---|")
    for backbone, channels in BACKBONES.items():
        checkpoint = write_checkpoint(folder, backbone)
        model = torch.load(checkpoint)["model"]
        export_openvino(checkpoint, folder / f"{backbone}.xml")
        squares = noise(1, 300)
        medians = time_both(eager(model), load_exported(folder / f"{backbone}.xml").forward, squares, args.rounds)
        print(f"| {backbone} | {channels} | {describe_size(model, squares)} | {medians} |")


def time_both(plain, exported, squares, rounds):
    medians = take_turns({"plain": lambda: plain(squares), "exported": lambda: exported(squares)}, rounds)
    return " | ".join(f"{1000 * seconds:.1f}" for seconds in medians.values())


def describe_size(model, squares):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(squares)
    parameters = sum(p.numel() for p in model.parameters())
    return f"{parameters / 1e6:.1f} M | {counter.get_total_flops() / 2 / 1e9:.2f} G"


class PeerNetwork(torch.nn.Module):
    """Backbone and heads of one of torchvision's detectors, without its resizing and its decoding."""

    def __init__(self, detector):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images):
        images = (images.float() / 255 - 0.45) / 0.225  # one scale for all channels: it is the time that counts
        return tuple(self.head(list(self.backbone(images).values())).values())


def measure_peers(folder, args):
    import openvino

    print("\nPeers, random weights, batch 1, ms a picture")
    print("| network | side | parameters | multiply-adds | eager fp32 | OpenVINO |\n|---|---|---|---|---|---|")
    for name, side in PEERS.items():
        torch.manual_seed(0)
        make = getattr(torchvision.models.detection, name)
        model = PeerNetwork(make(weights=None, weights_backbone=None, num_classes=len(VOC_CLASSES) + 1)).eval()
        squares = noise(1, side)
        network = openvino.convert_model(model, example_input=squares, input=list(squares.shape))
        request = openvino.compile_model(network, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
        medians = time_both(eager(model), lambda s, r=request: r.infer([s.numpy()]), squares, args.rounds)
        print(f"| {name} | {side} | {describe_size(model, squares)} | {medians} |")


STAGES = """
import time; times = [("", time.perf_counter())]
def stage(name): times.append((name, time.perf_counter()))
import torch; stage("import torch")
import detect; stage("import the rest")
detector = detect.load_detector({checkpoint!r}); stage("load the checkpoint")
picture = detect.load_image({picture!r}); stage("read the picture")
outputs = detector.run_network([picture]); stage("network")
(found,) = detector.postprocess(*outputs, [(picture.height, picture.width)]); stage("decode")
detect.annotate(picture, found).save({out!r}); stage("draw and write")
print("; ".join(f"{{name}} {{t - times[k][1]:.2f}} s" for k, (name, t) in enumerate(times[1:])))
"""


def measure_command(folder, args):
    print("\npython detect.py photo.jpg, Lite0, to the written picture; and a fresh process, stage by stage")
    checkpoint = write_checkpoint(folder, "tf_efficientnet_lite0")
    blocks = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((500, 375), Image.Resampling.BICUBIC).save(folder / "photo.jpg")
    names = {"checkpoint": str(checkpoint), "picture": str(folder / "photo.jpg"), "out": str(folder / "out.jpg")}
    command = [sys.executable, str(ROOT / "detect.py"), names["picture"], "--checkpoint", names["checkpoint"]]
    run = {
        "cwd": folder,
        "check": True,
        "capture_output": True,
        "text": True,
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
    }
    ways = {"detect.py": command, "imports": [sys.executable, "-c", "import torch, torchvision, timm"]}
    seconds = {name: [] for name in ways}
    for _ in range(min(args.rounds, 5)):
        for name, way in ways.items():
            seconds[name].append(cpu_seconds(way, run))
    ours, imports = (statistics.median(values) for values in seconds.values())
    stages = subprocess.run([sys.executable, "-c", STAGES.format(**names)], **run).stdout.strip()
    print(f"{ours:.2f} s of CPU (median), {ours / imports:.2f} times importing torch, torchvision and timm; {stages}")


def cpu_seconds(command, options):
    """User and system seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
