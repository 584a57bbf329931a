"""Exports a checkpoint to ONNX, OpenVINO or half precision, and compares the result with the original.

    python export.py runs/lite/best.pth.tar --to onnx openvino                 # runs/lite/best.onnx, best.xml
    python export.py runs/lite/best.pth.tar --to openvino --data data/vocreal  # compared on real photographs: AP too
    python export.py runs/lite/best.pth.tar --decode                       # and best_detect.onnx, for other programs
    python export.py runs/lite/best.pth.tar --to openvino --int8 data/vocreal/train.json  # best_int8.xml
    python export.py runs/lite/last.pth.tar --to fp16              # runs/lite/last_fp16.pth.tar, half the size
    python eval.py runs/lite/best.xml --data data/vocreal                      # detect.py takes it too

An fp16 checkpoint cannot be resumed. The other files take uint8 images (B, 3, S, S), any batch size, and return offsets
(B, P, 4) and logits (B, P, C + 1): they include the normalisation, but not the decoding, which is model.postprocess.
Their metadata holds the configuration. They need the extra `deploy`: pip install -e '.[deploy]'
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import DetectionDataset
from fpnssd.data.data_list import DataList, evenly_spaced
from fpnssd.evaluation.predict import Predictor, check_same_classes, evaluate
from fpnssd.inference.detector import Detector, load_detector
from fpnssd.inference.runtimes import CONFIG_KEY, SOURCE_KEY, SUFFIXES, exported_path, import_optional, load_exported
from model import (
    CENTRE_VARIANCE,
    DETECTION,
    EVALUATION,
    FPNSSD,
    MAX_SIDE_OFFSET,
    SIDE_VARIANCE,
    decode_offsets,
    load_checkpoint,
    postprocess,
    save_checkpoint,
)
from utils import HelpFormatter, InputError, atomic_write, check_outputs, error_message, hash_file, whole_number

CALIBRATION_IMAGES = 300
FP16_FIELDS = ("train_config", "num_images", "list_hash", "versions")  # that an fp16 checkpoint has beside the model
BATCH = torch.export.Dim("batch", min=1, max=4096)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        check_outputs(outputs_of(args), [args.checkpoint, args.int8], args.overwrite)
        data_list = DataList.load(Path(args.data) / f"{args.split}.json", args.images) if args.data else None
        original = load_detector(args.checkpoint, "cpu", "torch", "fp32")
        if data_list:
            check_same_classes(original.classes, data_list, args.checkpoint)
        for kind in args.to:
            path = path_of(args, kind)
            if kind == "fp16":
                export_fp16(args.checkpoint, path)
            elif kind == "onnx":
                export_onnx(args.checkpoint, path)
            else:
                export_openvino(args.checkpoint, path, args.int8, args.images)
            print(f"wrote {path}, {size_of(path) / 1e6:.1f} MB")
            exported = load_detector(path, "cpu", "auto", "fp32" if kind == "fp16" else "auto")
            print(format_comparison(compare(original, exported, data_list, args.count)))
        if args.decode:
            path = exported_path(args.out or args.checkpoint, "onnx", "_detect")
            plain = exported_path(args.out or args.checkpoint, "onnx") if "onnx" in args.to else path
            if plain == path:  # the file without decoding was not written above
                export_onnx(args.checkpoint, plain)
            export_with_decoding(plain, path, args.top_k)
            images = sample_images(original, data_list, args.count)
            same = compare_decoding(original, path, images, args.top_k)
            print(
                f"wrote {path}, {size_of(path) / 1e6:.1f} MB\n  the same detections in {same} of {len(images)} images"
            )
    except (InputError, OSError) as error:
        sys.exit(f"export: {error_message(error)}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument("checkpoint", help="checkpoint to export")
    parser.add_argument("--to", nargs="+", choices=(*SUFFIXES, "fp16"), default=["onnx"], help="formats to write")
    parser.add_argument("--out", help="path to write, without suffix (default: beside the checkpoint)")
    parser.add_argument("--int8", metavar="LIST", help="OpenVINO in 8 bits, calibrated on images of this data list")
    parser.add_argument("--decode", action="store_true", help="also write NAME_detect.onnx, which includes decoding")
    parser.add_argument("--top-k", type=whole_number(1), default=DETECTION.top_k, help="maximum detections of --decode")
    parser.add_argument("--data", help="folder of data lists: compare on their images instead of noise")
    parser.add_argument("--split", default="val", help="name of the data list")
    parser.add_argument("--images", help="folder of the images, if not that of the data list")
    parser.add_argument("--overwrite", action="store_true", help="also replace files that this program did not write")
    parser.add_argument("--count", type=whole_number(1), default=32, help="number of images to compare on")
    args = parser.parse_args(argv)
    if args.int8 and "openvino" not in args.to:
        parser.error("--int8 needs --to openvino")
    return args


def outputs_of(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """(kind, path) of each file that will be written, for utils.check_outputs."""
    outputs = [("checkpoint" if kind == "fp16" else "exported", path_of(args, kind)) for kind in dict.fromkeys(args.to)]
    outputs += [("exported", path.with_suffix(".bin")) for _, path in outputs if path.suffix == ".xml"]
    decoded = [("exported", exported_path(args.out or args.checkpoint, "onnx", "_detect"))] if args.decode else []
    return outputs + decoded


def path_of(args: argparse.Namespace, kind: str) -> Path:
    """The file that an export of this kind is written to."""
    if kind == "fp16":
        return exported_path(args.out or args.checkpoint, kind, "" if args.out else "_fp16")
    return exported_path(args.out or args.checkpoint, kind, "_int8" if args.int8 and kind == "openvino" else "")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def export_fp16(checkpoint: str | Path, path: Path) -> None:
    """Writes a checkpoint with weights in fp16 and without the training state; like all others, it is loaded as fp32.

    Buffers stay in fp32: the variances of batch norm may exceed the range of fp16.
    """
    content = load_checkpoint(checkpoint)
    model = content["model"]
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    save_checkpoint(path, model, "checkpoint", **{name: content[name] for name in FP16_FIELDS if name in content})


def export_onnx(checkpoint: str | Path, path: Path) -> None:
    """Writes a checkpoint's network as ONNX, for any batch size."""
    onnx = import_optional("onnx")
    import_optional("onnxscript")  # torch's exporter needs it

    model = load_checkpoint(checkpoint)["model"]
    side = model.config.image_size
    with atomic_write(path) as temporary:
        torch.onnx.export(
            model, (example_of(side),), temporary, input_names=["images"], output_names=["offsets", "logits"],
            dynamic_shapes={"images": {0: BATCH}}, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        exported = onnx.load(temporary)
        onnx.helper.set_model_props(exported, {CONFIG_KEY: config_text(model), SOURCE_KEY: hash_file(checkpoint)})
        onnx.checker.check_model(exported)
        onnx.save(exported, temporary)


def export_with_decoding(plain: Path, path: Path, top_k: int = DETECTION.top_k) -> None:
    """Writes an ONNX file with decoding, for programs without this project's code.

    Inputs: images uint8 (B, 3, S, S), min_score (1,), max_overlap (1,). Outputs, best first and padded with zeros:
    boxes (B, top_k, 4) xyxy in 0..1 of the image, scores (B, top_k), labels (B, top_k) int64 of 1..C, count (B,) int64.
    They are those of model.postprocess.

    Args:
        plain: a file of export_onnx.
        path: of the new file.
        top_k: maximum number of detections per image.
    """
    onnx = import_optional("onnx")
    loaded, exported = load_exported(plain), onnx.load(plain)
    combined = add_decoding(exported, loaded.priors, len(loaded.config.classes), top_k)
    with atomic_write(path) as temporary:
        onnx.save(combined, temporary)


def add_decoding(exported: Any, priors: torch.Tensor, num_classes: int, top_k: int) -> Any:
    """The ModelProto of export_onnx with decoding behind it; arguments and result as for export_with_decoding."""
    onnx, onnxscript = import_optional("onnx"), import_optional("onnxscript")
    opset = next(entry.version for entry in exported.opset_import if entry.domain == "")
    count = min(top_k, len(priors) * num_classes)
    decode = decoding_function(getattr(onnxscript, f"opset{opset}"), priors, num_classes, count)
    decoding = decode.to_model_proto(ir_version=exported.ir_version)
    num_priors, float32, int64 = len(priors), onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [
        ("offsets", float32, ["batch", num_priors, 4]),
        ("logits", float32, ["batch", num_priors, num_classes + 1]),
    ]
    inputs += [("min_score", float32, [1]), ("max_overlap", float32, [1])]
    outputs = [("boxes", float32, ["batch", count, 4]), ("scores", float32, ["batch", count])]
    outputs += [("labels", int64, ["batch", count]), ("count", int64, ["batch"])]
    for values, types in ((decoding.graph.input, inputs), (decoding.graph.output, outputs)):
        for value, (name, kind, shape) in zip(values, types, strict=True):
            value.CopyFrom(onnx.helper.make_tensor_value_info(name, kind, shape))
    decoding = onnx.compose.add_prefix(decoding, "decode_", rename_inputs=False, rename_outputs=False)
    combined = onnx.compose.merge_models(exported, decoding, [(name, name) for name in ("offsets", "logits")])
    onnx.helper.set_model_props(combined, {entry.key: entry.value for entry in exported.metadata_props})
    onnx.checker.check_model(combined)
    return combined


def decoding_function(op: Any, priors: torch.Tensor, num_classes: int, top_k: int) -> Any:
    """model.postprocess for onnxscript, in the operators `op` of an ONNX opset; boxes stay in 0..1."""
    onnx, onnxscript = import_optional("onnx"), import_optional("onnxscript")
    centres_of_priors, sides_of_priors = (onnx.numpy_helper.from_array(part.numpy()) for part in priors.split(2, dim=1))
    most, int64 = [top_k], onnx.TensorProto.INT64

    @onnxscript.script(default_opset=op)
    def decode(offsets, logits, min_score, max_overlap):  # types are set by add_decoding
        prior_sides = op.Constant(value=sides_of_priors)  # (P, 2)
        centres = op.Constant(value=centres_of_priors) + offsets[:, :, 0:2] * CENTRE_VARIANCE * prior_sides
        half = prior_sides * op.Exp(op.Min(offsets[:, :, 2:4] * SIDE_VARIANCE, MAX_SIDE_OFFSET)) * 0.5
        low, high = op.Clip(centres - half, 0.0, 1.0), op.Clip(centres + half, 0.0, 1.0)
        all_boxes = op.Concat(low, high, axis=2)  # (B, P, 4)
        has_area = op.ReduceMin(high - low, [2], keepdims=1) > 0.0
        all_scores = op.Where(has_area, op.Softmax(logits, axis=2)[:, :, 1:], 0.0)
        by_class = op.Transpose(all_scores, perm=[0, 2, 1])  # (B, C, P)
        limit = op.Constant(value_ints=most)
        kept = op.NonMaxSuppression(all_boxes, by_class, limit, max_overlap, min_score)  # (n, 3) image, class, prior
        kept_scores = op.ScatterND(by_class * 0.0, kept, op.GatherND(by_class, kept))
        # Equal scores in the order prior, class: TopK takes the lower index first.
        scores, best = op.TopK(op.Reshape(op.Transpose(kept_scores, perm=[0, 2, 1]), [0, -1]), limit, axis=1)
        found = scores > 0.0
        best_boxes = op.GatherND(all_boxes, op.Unsqueeze(best / num_classes, [2]), batch_dims=1)
        boxes = op.Where(op.Unsqueeze(found, [2]), best_boxes, 0.0)
        labels = op.Where(found, op.Mod(best, num_classes) + 1, 0)
        count = op.ReduceSum(op.Cast(found, to=int64), [1], keepdims=0)
        return boxes, scores, labels, count

    return decode


def export_openvino(
    checkpoint: str | Path, path: Path, int8_list: str | Path | None = None, images: str | Path | None = None
) -> None:
    """Writes a checkpoint's network as OpenVINO's .xml and .bin.

    Args:
        checkpoint: path of a .pth.tar file.
        path: of the .xml file.
        int8_list: a data list to calibrate 8-bit weights and activations on; fp32 without it.
        images: folder of its images, instead of the list's.
    """
    openvino = import_optional("openvino")
    model = load_checkpoint(checkpoint)["model"]
    side = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about shapes, which do not change
        warnings.simplefilter("ignore", FutureWarning)  # torch recommends torch.export
        # Traced nevertheless: torch.export takes four times as long.
        exported = openvino.convert_model(model, example_input=example_of(side), input=[-1, 3, side, side])
    if int8_list:
        exported = quantise(exported, DataList.load(int8_list, images), side)
    exported.set_rt_info(config_text(model), CONFIG_KEY)
    exported.set_rt_info(hash_file(checkpoint), SOURCE_KEY)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        openvino.save_model(exported, temporary, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):  # the .xml last, so that its weights exist when it appears
            os.replace(temporary.with_suffix(suffix), path.with_suffix(suffix))


def quantise(exported: Any, data_list: DataList, side: int) -> Any:
    """An OpenVINO model with 8-bit weights and activations, calibrated on CALIBRATION_IMAGES evenly spaced images."""
    nncf = import_optional("nncf")
    rows = evenly_spaced(len(data_list), CALIBRATION_IMAGES)
    samples = torch.utils.data.Subset(DetectionDataset(data_list, side), rows)
    calibration = nncf.Dataset(samples, lambda sample: sample["image"][None].numpy())
    return nncf.quantize(exported, calibration, subset_size=len(rows), preset=nncf.QuantizationPreset.MIXED)


def example_of(side: int) -> torch.Tensor:
    """An input for tracing: two images, as a batch of one would become a constant."""
    return torch.zeros(2, 3, side, side, dtype=torch.uint8)


def config_text(model: FPNSSD) -> str:
    """The configuration as JSON, for a file's metadata."""
    return json.dumps(asdict(model.config))


def size_of(path: Path) -> int:
    """Bytes of an exported file, with OpenVINO's .bin."""
    return path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(
    original: Detector, exported: Detector, data_list: DataList | None = None, count: int = 32
) -> dict[str, Any]:
    """Compares the outputs of two detectors on `count` images of a data list, or on noise without one.

    Raises:
        InputError: if outputs of the exported network are not finite.

    Returns:
        images and whether they are real; largest: the largest differences of scores, and of boxes in 0..1 where a score
        is 0.05 or more; with a data list ap: VOC2007 and COCO AP of both.
    """
    images = sample_images(original, data_list, count)
    largest = {"score": 0.0, "box": 0.0}
    for batch in images.split(8):
        (offsets, logits), (other_offsets, other_logits) = original.forward(batch), exported.forward(batch)
        for outputs, what in ((offsets, logits), "checkpoint's"), ((other_offsets, other_logits), "exported file's"):
            if not all(part.isfinite().all() for part in outputs):
                raise InputError(f"the {what} outputs are not finite: do not use it")
        scores, other_scores = logits.softmax(dim=2)[..., 1:], other_logits.softmax(dim=2)[..., 1:]
        seen = scores.amax(dim=2) >= 0.05
        boxes, other_boxes = (decode_offsets(o, original.priors)[seen] for o in (offsets, other_offsets))
        largest["score"] = max(largest["score"], (scores - other_scores).abs().max().item())
        largest["box"] = max(largest["box"], (boxes - other_boxes).abs().max().item() if len(boxes) else 0.0)
    result: dict[str, Any] = {"images": len(images), "real": data_list is not None, "largest": largest}
    if data_list is not None:
        side = original.config.image_size
        metrics = [evaluate(Predictor(detector), data_list, side) for detector in (original, exported)]
        result["ap"] = {name: [m[name] for m in metrics if m] for name in ("voc2007_ap50", "coco_ap")}
    return result


def sample_images(detector: Detector, data_list: DataList | None = None, count: int = 32) -> torch.Tensor:
    """uint8 (n, 3, S, S): evenly spaced images of a data list, or noise without one."""
    side = detector.config.image_size
    if data_list is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=generator)
    rows = evenly_spaced(len(data_list), count)
    return torch.stack([DetectionDataset(data_list, side)[row]["image"] for row in rows])


def compare_decoding(original: Detector, path: Path, images: torch.Tensor, top_k: int, min_score: float = 0.05) -> int:
    """The number of images (n, 3, S, S) for which a file with decoding returns the same labels as model.postprocess,
    and the same boxes within 1e-4 of the image."""
    max_overlap = EVALUATION.max_overlap
    onnxruntime = import_optional("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    same = 0
    for image in images:
        thresholds = {
            "min_score": np.array([min_score], dtype=np.float32),
            "max_overlap": np.array([max_overlap], dtype=np.float32),
        }
        boxes, _, labels, count = session.run(None, {"images": image[None].numpy(), **thresholds})
        (expected,) = postprocess(
            *original.forward(image[None]), original.priors, [(1, 1)], min_score, max_overlap, top_k
        )
        number = int(count[0])
        if labels[0, :number].tolist() == expected["labels"].tolist():
            same += np.allclose(boxes[0, :number], expected["boxes"].numpy(), atol=1e-4)
    return same


def format_comparison(result: dict[str, Any]) -> str:
    """The result of compare as text."""
    largest, kind = result["largest"], "photographs" if result["real"] else "images of noise (--data for photographs)"
    lines = [
        f"  largest difference on {result['images']} {kind}: score {largest['score']:.2g}, box {largest['box']:.2g} of "
        "the image"
    ]
    for name, (before, after) in result.get("ap", {}).items():
        if before is not None:
            lines.append(f"  {name} {100 * before:.2f} -> {100 * after:.2f} ({100 * (after - before):+.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
