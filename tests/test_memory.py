"""What benchmarks/memory.py measures, held to its limits."""

import sys

import pytest

from benchmarks import memory

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc"),
]


def test_the_cache_is_no_workers_own(tmp_path):
    report = memory.measure_cache(tmp_path, 2_000)
    assert report["cache, MB"] > 1024
    assert report["difference, % of the cache"] < 5


def test_a_million_images(tmp_path):
    report = memory.measure_scale(tmp_path, 1_000_000)
    assert 0 < report["arrays kept beside it, MB"] < 500
    assert report["warm: peak memory of loading, MB"] < 500
    for start_method in ("fork", "spawn"):
        assert report[f"warm: {start_method}: of it because of the list, MB"] < 50
