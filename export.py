"""A checkpoint as ONNX, OpenVINO or one of half the size, compared with the original before it is called done.

    python export.py runs/lite/best.pth.tar --to onnx openvino                 # runs/lite/best.onnx, best.xml
    python export.py runs/lite/best.pth.tar --to openvino --data data/vocreal  # compared on real photographs: AP too
    python export.py runs/lite/best.pth.tar --decode                       # best_detect.onnx too: for other programs
    python export.py runs/lite/best.pth.tar --to openvino --int8 data/vocreal/train.json  # best_int8.xml
    python export.py runs/lite/last.pth.tar --to fp16              # runs/lite/last_fp16.pth.tar, for giving away
    python eval.py runs/lite/best.xml --data data/vocreal                      # as does detect.py

What fp16 writes is a checkpoint without what resuming needs. The other files take uint8 images (B, 3, S, S), B as you
like, and answer with offsets (B, P, 4) and logits (B, P, C + 1): preprocessing is inside, decoding is
model.postprocess. They carry the classes and the configuration, and need the extra `deploy`: pip install -e '.[deploy]'
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from datasets import DetectionDataset
from fpnssd.data.data_list import DataList, evenly_spaced
from fpnssd.evaluation.predict import Predictor, evaluate
from fpnssd.inference.detector import load_detector
from fpnssd.inference.runtimes import CONFIG_KEY, SOURCE_KEY, SUFFIXES, exported_path, import_optional, load_exported
from model import CENTRE_VARIANCE, SIDE_VARIANCE, decode_offsets, load_checkpoint, postprocess, save_checkpoint
from utils import InputError, atomic_write, check_outputs, error_message, hash_file, whole_number

CALIBRATION_IMAGES = 300
KEPT = ("train_config", "num_images", "list_hash", "versions")  # by fp16, of what a checkpoint holds beside the model
BATCH = torch.export.Dim("batch", min=1, max=4096)


def main(argv=None):
    args = parse_args(argv)
    try:
        check_outputs(outputs_of(args), [args.checkpoint, args.int8], args.overwrite)
        data_list = DataList.load(Path(args.data) / f"{args.split}.json", args.images) if args.data else None
        original = load_detector(args.checkpoint, "cpu", "torch", "fp32")
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
            if plain == path:  # nobody asked for the one without
                export_onnx(args.checkpoint, plain)
            export_with_decoding(plain, path, args.top_k)
            squares = sample_images(original, data_list, args.count)
            same, images = compare_decoding(original, path, squares, args.top_k), len(squares)
            print(f"wrote {path}, {size_of(path) / 1e6:.1f} MB\n  the same detections in {same} of {images} images")
    except (InputError, OSError) as error:
        sys.exit(f"export: {error_message(error)}")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--to", nargs="+", choices=(*SUFFIXES, "fp16"), default=["onnx"])
    parser.add_argument("--out", help="file to write, without its ending; else beside the checkpoint")
    parser.add_argument("--int8", metavar="LIST", help="OpenVINO in 8 bits, calibrated on images of this data list")
    parser.add_argument("--decode", action="store_true", help="besides, NAME_detect.onnx that ends in detections")
    parser.add_argument("--top-k", type=whole_number(1), default=200, help="of --decode: detections an image")
    parser.add_argument("--data", help="folder of data lists, to compare on photographs")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", help="folder of the photographs, if not where the data list says")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this program did not write, too")
    parser.add_argument("--count", type=whole_number(1), default=32, help="images to compare outputs on")
    args = parser.parse_args(argv)
    if args.int8 and "openvino" not in args.to:
        parser.error("--int8 is for --to openvino")
    return args


def outputs_of(args):
    """(kind, path) of each file that will be written, for utils.check_outputs."""
    outputs = [("checkpoint" if kind == "fp16" else "exported", path_of(args, kind)) for kind in dict.fromkeys(args.to)]
    outputs += [("exported", path.with_suffix(".bin")) for _, path in outputs if path.suffix == ".xml"]
    decoded = [("exported", exported_path(args.out or args.checkpoint, "onnx", "_detect"))] if args.decode else []
    return outputs + decoded


def path_of(args, kind):
    if kind == "fp16":
        return exported_path(args.out or args.checkpoint, kind, "" if args.out else "_fp16")
    return exported_path(args.out or args.checkpoint, kind, "_int8" if args.int8 and kind == "openvino" else "")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def export_fp16(checkpoint, path):
    """Writes a checkpoint of the weights in fp16 and the recipe alone; it loads as fp32, like every other one.

    Buffers stay as they are: the variances of batch norm may lie beyond fp16.
    """
    content = load_checkpoint(checkpoint)
    model = content["model"]
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    save_checkpoint(path, model, "checkpoint", **{name: content[name] for name in KEPT if name in content})


def export_onnx(checkpoint, path):
    """Writes the checkpoint's network as ONNX with a dynamic batch."""
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


def export_with_decoding(plain, path, top_k=200):
    """Writes ONNX that ends in detections, for programs without this project's code; plain: what export_onnx wrote.

    Inputs: images uint8 (B, 3, S, S), min_score (1,), max_overlap (1,). Outputs, best first and padded with zeros:
    boxes (B, top_k, 4) xyxy in 0..1 of the image, scores (B, top_k), labels (B, top_k) int64 of 1..C, count (B,) int64.
    The answer is model.postprocess's: per class, by the standard operator NonMaxSuppression.
    """
    onnx = import_optional("onnx")
    loaded, exported = load_exported(plain), onnx.load(plain)
    add_decoding(exported, loaded.priors, len(loaded.config.classes), top_k)
    onnx.checker.check_model(exported)
    with atomic_write(path) as temporary:
        onnx.save(exported, temporary)


def add_decoding(exported, priors, num_classes, top_k):
    """Replaces a model's outputs offsets and logits by boxes, scores, labels and count."""
    from onnx import TensorProto, helper, numpy_helper

    graph, num_priors = exported.graph, len(priors)
    count = min(top_k, num_priors * num_classes)
    constants = {
        "prior_centres": priors[:, :2].numpy(), "prior_sides": priors[:, 2:].numpy(),
        "centre_variance": np.float32(CENTRE_VARIANCE), "side_variance": np.float32(SIDE_VARIANCE),
        "zero": np.float32(0), "half": np.float32(0.5), "one": np.float32(1), "no_label": np.int64(0),
        "from_1": np.array([1]), "from_2": np.array([2]), "from_0": np.array([0]), "axis_1": np.array([1]),
        "axis_2": np.array([2]), "to_2": np.array([2]), "to_4": np.array([4]),
        "to_end": np.array([2**31 - 1]), "first_label": np.int64(1), "classes": np.int64(num_classes),
        "pairs": np.array([num_priors * num_classes]), "top_k": np.array([count]), "last": np.array([-1]),
        "batch_column": np.int64(0), "class_column": np.int64(1), "prior_column": np.int64(2),
    }  # fmt: skip
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), f"decode_{name}") for name, value in constants.items()
    )

    def node(operator, inputs, output, **attributes):
        inputs = [f"decode_{name}" if name in constants else name for name in inputs]
        graph.node.append(helper.make_node(operator, inputs, [output], **attributes))

    # Boxes: (B, P, 4) corners, clipped.
    node("Slice", ["offsets", "from_0", "to_2", "axis_2"], "d_moves")
    node("Slice", ["offsets", "from_2", "to_4", "axis_2"], "d_growths")
    node("Mul", ["d_moves", "centre_variance"], "d_moves_scaled")
    node("Mul", ["d_moves_scaled", "prior_sides"], "d_shifts")
    node("Add", ["d_shifts", "prior_centres"], "d_centres")
    node("Mul", ["d_growths", "side_variance"], "d_growths_scaled")
    node("Exp", ["d_growths_scaled"], "d_factors")
    node("Mul", ["d_factors", "prior_sides"], "d_sides")
    node("Mul", ["d_sides", "half"], "d_halves")
    node("Sub", ["d_centres", "d_halves"], "d_low_raw")
    node("Add", ["d_centres", "d_halves"], "d_high_raw")
    node("Clip", ["d_low_raw", "zero", "one"], "d_low")
    node("Clip", ["d_high_raw", "zero", "one"], "d_high")
    node("Concat", ["d_low", "d_high"], "d_boxes", axis=2)
    # Scores: (B, C, P), 0 for boxes that were clipped away.
    node("Softmax", ["logits"], "d_shares", axis=2)
    node("Slice", ["d_shares", "from_1", "to_end", "axis_2"], "d_scores_raw")
    node("Sub", ["d_high", "d_low"], "d_extents")
    node("ReduceMin", ["d_extents", "axis_2"], "d_narrowest", keepdims=1)
    node("Greater", ["d_narrowest", "zero"], "d_is_box")
    node("Where", ["d_is_box", "d_scores_raw", "zero"], "d_scores")
    node("Transpose", ["d_scores"], "d_scores_by_class", perm=[0, 2, 1])
    # What survives, (N, 3) of image, class, prior, goes back to its place in (B, P * C), where the best are taken.
    node("NonMaxSuppression", ["d_boxes", "d_scores_by_class", "top_k", "max_overlap", "min_score"], "d_kept")
    node("GatherND", ["d_scores_by_class", "d_kept"], "d_kept_scores")
    for column in ("batch", "class", "prior"):
        node("Gather", ["d_kept", f"{column}_column"], f"d_kept_{column}", axis=1)
    node("Mul", ["d_kept_prior", "classes"], "d_kept_row")
    node("Add", ["d_kept_row", "d_kept_class"], "d_kept_pair")
    for name in ("batch", "pair"):
        node("Unsqueeze", [f"d_kept_{name}", "axis_1"], f"d_place_{name}")
    node("Concat", ["d_place_batch", "d_place_pair"], "d_places", axis=1)
    node("Shape", ["logits"], "d_batch", start=0, end=1)
    node("Concat", ["d_batch", "pairs"], "d_dense_shape", axis=0)
    node("ConstantOfShape", ["d_dense_shape"], "d_nothing")
    node("ScatterND", ["d_nothing", "d_places", "d_kept_scores"], "d_dense")
    graph.node.append(helper.make_node("TopK", ["d_dense", "decode_top_k"], ["scores", "d_best"], axis=1))
    node("Div", ["d_best", "classes"], "d_best_prior")
    node("Mod", ["d_best", "classes"], "d_best_class")
    node("Add", ["d_best_class", "first_label"], "d_labels")
    node("Unsqueeze", ["d_best_prior", "last"], "d_best_places")
    node("GatherND", ["d_boxes", "d_best_places"], "d_best_boxes", batch_dims=1)
    node("Greater", ["scores", "zero"], "d_there")
    node("Unsqueeze", ["d_there", "last"], "d_there_box")
    node("Where", ["d_there_box", "d_best_boxes", "zero"], "boxes")
    node("Where", ["d_there", "d_labels", "no_label"], "labels")
    node("Cast", ["d_there"], "d_there_number", to=TensorProto.INT64)
    node("ReduceSum", ["d_there_number", "axis_1"], "count", keepdims=0)

    knobs = ("min_score", "max_overlap")
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in knobs)
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", count, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", count]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", count]),
            helper.make_tensor_value_info("count", TensorProto.INT64, ["batch"]),
        ]
    )


def export_openvino(checkpoint, path, int8_list=None, images=None):
    """Writes the checkpoint's network as OpenVINO's .xml and .bin; in 8 bits if calibrated on a data list."""
    openvino = import_optional("openvino")
    model = load_checkpoint(checkpoint)["model"]
    side = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about shapes, which do not change
        warnings.simplefilter("ignore", FutureWarning)  # torch would rather have torch.export
        # By tracing all the same: through torch.export it takes four times as long.
        exported = openvino.convert_model(model, example_input=example_of(side), input=[-1, 3, side, side])
    if int8_list:
        exported = quantised(exported, DataList.load(int8_list, images), side)
    exported.set_rt_info(config_text(model), CONFIG_KEY)
    exported.set_rt_info(hash_file(checkpoint), SOURCE_KEY)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        openvino.save_model(exported, temporary, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):  # who finds the .xml finds its weights
            os.replace(temporary.with_suffix(suffix), path.with_suffix(suffix))


def quantised(exported, data_list, side):
    """8-bit weights and activations, from what CALIBRATION_IMAGES of the list, evenly spaced, make of them."""
    nncf = import_optional("nncf")
    rows = evenly_spaced(len(data_list), CALIBRATION_IMAGES)
    samples = torch.utils.data.Subset(DetectionDataset(data_list, side), rows)
    calibration = nncf.Dataset(samples, lambda sample: sample["image"][None].numpy())
    return nncf.quantize(exported, calibration, subset_size=len(rows), preset=nncf.QuantizationPreset.MIXED)


def example_of(side):
    return torch.zeros(2, 3, side, side, dtype=torch.uint8)  # of one, the batch would become a constant


def config_text(model):
    return json.dumps(asdict(model.config))


def size_of(path):
    """Bytes; OpenVINO keeps its weights in a file beside."""
    return path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(original, exported, data_list=None, count=32):
    """How far an exported Detector is from the original: largest differences of scores and of boxes in 0..1 (where the
    score is 0.05 or more), and both VOC2007 and COCO AP if there is a data list; on noise if there is none."""
    images = sample_images(original, data_list, count)
    largest = {"score": 0.0, "box": 0.0}
    for batch in images.split(8):
        (offsets, logits), (other_offsets, other_logits) = original.forward(batch), exported.forward(batch)
        scores, other_scores = logits.softmax(dim=2)[..., 1:], other_logits.softmax(dim=2)[..., 1:]
        seen = scores.amax(dim=2) >= 0.05
        boxes, other_boxes = (decode_offsets(o, original.priors)[seen] for o in (offsets, other_offsets))
        largest["score"] = max(largest["score"], (scores - other_scores).abs().max().item())
        largest["box"] = max(largest["box"], (boxes - other_boxes).abs().max().item() if len(boxes) else 0.0)
    result = {"images": len(images), "real": data_list is not None, "largest": largest}
    if data_list is not None:
        side = original.config.image_size
        metrics = [evaluate(Predictor(detector), data_list, side) for detector in (original, exported)]
        result["ap"] = {name: [m[name] for m in metrics] for name in ("voc2007_ap50", "coco_ap")}
    return result


def sample_images(detector, data_list=None, count=32):
    """uint8 (n, 3, S, S): of a data list, evenly spaced; noise if there is none."""
    side = detector.config.image_size
    if data_list is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=generator)
    rows = evenly_spaced(len(data_list), count)
    return torch.stack([DetectionDataset(data_list, side)[row]["image"] for row in rows])


def compare_decoding(original, path, squares, top_k, min_score=0.05, max_overlap=0.45):
    """In how many images a file with decoding finds what model.postprocess does: labels alike, and boxes to 1e-4."""
    onnxruntime = import_optional("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    same = 0
    for square in squares:
        knobs = {"min_score": np.float32([min_score]), "max_overlap": np.float32([max_overlap])}
        boxes, _, labels, count = session.run(None, {"images": square[None].numpy(), **knobs})
        answer = original.forward(square[None])
        (wanted,) = postprocess(*answer, original.priors, [(1, 1)], min_score, max_overlap, top_k)
        found = int(count[0])
        if found == len(wanted["labels"]) and labels[0, :found].tolist() == wanted["labels"].tolist():
            same += np.allclose(boxes[0, :found], wanted["boxes"].numpy(), atol=1e-4)
    return same


def format_comparison(result):
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
