"""The numbers of an evaluation as text."""

from typing import Any

from fpnssd.evaluation.metrics import percent


def format_table(metrics: dict[str, Any]) -> str:
    """compute_metrics as text, in percent: a row for each class, then the means with their 95 % intervals."""
    columns = ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")
    width = max(len("class"), *(len(name) for name in metrics["per_class"]))
    lines = [f"{'class':{width}}  objects  detections  " + "  ".join(f"{c:>12}" for c in columns)]
    for name, row in metrics["per_class"].items():
        numbers = "  ".join(f"{percent(row[c]):>12}" for c in columns)
        lines.append(f"{name:{width}}  {row['objects']:7}  {row['detections']:10}  {numbers}")
    lines.append("")
    for name, value in metrics.items():
        if name.startswith(("voc", "coco")):
            interval = metrics.get("intervals", {}).get(name)
            shown = f"  95 % interval {percent(interval[0])} .. {percent(interval[1])}" if interval else ""
            lines.append(f"{name:16} {percent(value):>6}{shown}")
    lines.append("")
    best = metrics["best_f1"]
    for row in [*metrics["at_scores"], *filter(None, [best])]:
        lines.append(
            f"score > {row['min_score']:.4g}: precision {percent(row['precision'])}, recall {percent(row['recall'])}, "
            f"F1 {percent(row['f1'])}{' (the highest F1)' if row is best else ''}"
        )
    if best and best["missed_classes"]:
        names = ", ".join(best["missed_classes"])
        lines.append(
            f"note: above {best['min_score']:.4g} no object of {names} is found; a lower threshold may show some"
        )
    if metrics["objects"] == 0:
        lines.append("the data list has no objects: there is nothing to score against")
    seconds, settings = metrics.get("seconds", {}), metrics.get("settings", {})
    if seconds:
        total = sum(seconds.values())
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        lines.append(
            f"{metrics['images']} images in {total:.1f} s ({metrics['images'] / total:.1f} per second): {parts}"
        )
    if settings:
        lines.append(", ".join(f"{name} {value}" for name, value in settings.items()))
    return "\n".join(lines)
