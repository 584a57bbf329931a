"""Runs `make demo`: the shipped detector on photographs, then a training that takes minutes on a CPU.

    python demo.py        # needs the extra `demo`: pip install -e '.[demo]'

Pictures go to detected_img/, data to data/synthetic*, the training to runs/demo.
"""

import contextlib
import io
import shutil
import sys
import time
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

try:
    import skimage
except ImportError:
    sys.exit("demo: scikit-image is not installed: pip install -e '.[demo]'")

from create_data_lists import create_data_lists
from detect import annotate, load_detector
from fpnssd.data.data_list import DataList
from fpnssd.data.synthetic import draw_dataset
from fpnssd.data.voc import read_voc
from fpnssd.inference.detector import Detections, Detector
from fpnssd.training.config import demo as demo_config
from model import DEFAULT_CHECKPOINT, FPNSSD
from train import train
from utils import InputError, error_message

PHOTOGRAPHS = {  # file in an installed package: author, licence
    Path(skimage.__file__).parent / "data/chelsea.png": "Stefan van der Walt, CC0",
    Path(skimage.__file__).parent / "data/astronaut.png": "NASA, public domain",
    Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg": "US Navy, public domain",
}
VOC, LISTS, OUT = Path("data/synthetic_voc"), Path("data/synthetic"), Path("detected_img")
HEIGHT = 360  # pixels of a picture on a contact sheet


def main() -> None:
    start = time.perf_counter()
    try:
        detect_in_photographs(OUT / "demo_photographs.jpg")
        train_on_shapes(OUT / "demo_training.jpg")
    except (InputError, OSError, RuntimeError) as error:
        sys.exit(f"demo: {error_message(error)}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: stopped")
    print(f"Finished in {time.perf_counter() - start:.0f} s. To train on your own photographs:")
    if Path(sys.prefix) == Path(".venv").resolve():
        print("    . .venv/bin/activate")
    print("    python create_data_lists.py --yolo YOUR/data.yaml --splits train val --out data/mine")
    print("    python train.py --preset finetune --data data/mine --minutes 20")


def detect_in_photographs(sheet: Path) -> None:
    """Prints what the shipped detector finds in photographs, and draws it."""
    detector = load_detector(DEFAULT_CHECKPOINT, runtime="torch")
    print(f"1. The shipped detector has {len(detector.classes)} classes. Its detections in three photographs:")
    pictures = []
    for path, terms in PHOTOGRAPHS.items():
        image = Image.open(path).convert("RGB")
        detections = detector.predict(image)
        objects = ", ".join(f"{name} {score:.2f}" for _, score, _, name in detections.rows()) or "nothing"
        print(f"   {path.name} ({terms}): {objects}")
        pictures.append((annotate(image, detections), f"{path.name}: {terms}"))
    save_sheet(sheet, pictures, columns=3)
    print(f"   Look at {sheet}\n")


def train_on_shapes(sheet: Path) -> None:
    """Draws a data set, trains the `demo` preset on it, prints its AP and draws detections before and after."""
    config = demo_config()
    print("2. Drawing 300 images of six shapes to train on and 60 to evaluate on, and checking every box ...")
    with contextlib.redirect_stdout(io.StringIO()):
        draw_dataset(VOC, {"train": 300, "val": 60})
        splits = [read_voc([VOC], split) for split in ("train", "val")]
        create_data_lists(splits, LISTS)
    train_list, val_list = DataList.load(LISTS / "train.json"), DataList.load(LISTS / "val.json")
    print(f"   {len(train_list.labels)} objects of {', '.join(train_list.classes)}\n")

    print(f"3. Training {config.epochs} epochs on the CPU, from ImageNet weights; the bar shows losses and time left:")
    shutil.rmtree(Path("runs") / config.name, ignore_errors=True)  # of the previous demo
    with contextlib.redirect_stdout(EpochLines()):
        metrics = train(config)
    if metrics is None:
        raise RuntimeError("the training was stopped before it could be evaluated")
    folder = Path("runs") / config.name
    print(
        f"   On the 60 images that it did not see: VOC2007 AP50 {100 * metrics['voc2007_ap50']:.1f}, "
        f"COCO AP {100 * metrics['coco_ap']:.1f}"
    )
    trained = load_detector(folder / "last.pth.tar", runtime="torch")
    untrained = load_detector(FPNSSD(trained.config), precision="fp32")
    rows = [index for index in range(len(val_list)) if len(val_list.target(index)["labels"])][:3]
    pictures = []
    for title, detector in (("before training", untrained), ("after training", trained)):
        for row in rows:
            pictures.append((annotate(*best_detections(detector, val_list, row)), title))
    save_sheet(sheet, pictures, columns=len(rows))
    print(f"   See {sheet}, and {folder}/curves.png for the training curves\n")


class EpochLines(io.TextIOBase):
    """A text stream that prints only the lines of epochs of a training's output."""

    def write(self, text: str) -> int:
        if text.startswith("epoch"):
            print(f"   {text.rstrip()}", file=sys.__stdout__, flush=True)
        return len(text)


def best_detections(detector: Detector, data_list: DataList, row: int) -> tuple[Image.Image, Detections]:
    """An image of a list and its detections; if no score exceeds the default threshold (untrained), the best ten."""
    image = data_list.read_image(row)
    detections = detector.predict(image)
    return image, detections if len(detections) else detector.predict(image, min_score=0.01, top_k=10)


def save_sheet(path: Path, pictures: list[tuple[Image.Image, str]], columns: int) -> None:
    """Saves pictures in a grid, scaled to one height, with a title under each."""
    font, margin = ImageFont.load_default(size=15), 24
    parts = []
    for picture, title in pictures:
        part = picture.resize((round(picture.width * HEIGHT / picture.height), HEIGHT), Image.Resampling.LANCZOS)
        framed = Image.new("RGB", (part.width, HEIGHT + margin), "white")
        framed.paste(part, (0, 0))
        ImageDraw.Draw(framed).text((4, HEIGHT + 3), title, "black", font)
        parts.append(framed)
    rows = [parts[start : start + columns] for start in range(0, len(parts), columns)]
    gap = 6
    width = max(sum(part.width + gap for part in row) - gap for row in rows)
    sheet = Image.new("RGB", (width, len(rows) * (HEIGHT + margin + gap) - gap), "white")
    for number, row in enumerate(rows):
        left = 0
        for part in row:
            sheet.paste(part, (left, number * (HEIGHT + margin + gap)))
            left += part.width + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=92)


if __name__ == "__main__":
    main()
