"""What create_data_lists.py wrote: a list, and the report of its check."""

import json


def problems(out):
    """{kind: places} of check.json."""
    found = {}
    for row in json.loads((out / "check.json").read_text())["problems"]:
        assert row["count"] == len(row["where"])
        found.setdefault(row["kind"], []).extend(row["where"])
    return found


def listed(out, split="train"):
    return json.loads((out / f"{split}.json").read_text())
