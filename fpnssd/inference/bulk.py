"""Detections of millions of pictures as Parquet: the worker that computes them, and the folder that stores them.

bulk_detect.py connects the two with Ray Data. Every part file of a result has the columns of schema().
"""

import io
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import torch
from PIL import Image

from fpnssd.data.images import DataError
from fpnssd.inference.addresses import PictureReader, resolve
from fpnssd.inference.detector import Detections, batched, load_detector
from fpnssd.inference.outputs import failure_message
from utils import InputError, atomic_write

METADATA_KEY = b"fpn_ssd_detections"  # in each part file: the settings of the run, as JSON
PART_ROWS, PART_SECONDS = 10_000, 60.0  # after either of which a part file is written


def schema() -> Any:
    """The pyarrow.Schema of a result, one row per picture.

    Columns:
        path: the picture's address, as it was listed; it is unique.
        height, width: of the upright picture, in pixels; null for a picture that failed.
        boxes: (m, 4) float32, xyxy in pixels, best first.
        scores, labels, names: of the m detections; labels are 1..C.
        error: why the picture has no detections, as detect.py prints it; null if it was read.
        error_kind: the error without names, for counting.
    """
    import pyarrow as pa  # optional

    return pa.schema(
        {
            "path": pa.string(),
            "height": pa.int32(),
            "width": pa.int32(),
            "boxes": pa.list_(pa.list_(pa.float32(), 4)),
            "scores": pa.list_(pa.float32()),
            "labels": pa.list_(pa.int32()),
            "names": pa.list_(pa.string()),
            "error": pa.string(),
            "error_kind": pa.string(),
        }
    )


def _row(address: str, detections: Detections) -> dict[str, Any]:
    return {
        "path": address,
        "height": detections.size[0],
        "width": detections.size[1],
        "boxes": detections.boxes.tolist(),
        "scores": detections.scores.tolist(),
        "labels": detections.labels.tolist(),
        "names": detections.names,
    }


def _failed_row(address: str, error: Exception) -> dict[str, Any]:
    kind = error.kind if isinstance(error, DataError) else type(error).__name__
    lists: dict[str, Any] = {name: [] for name in ("boxes", "scores", "labels", "names")}
    return {"path": address, **lists, "error": failure_message(address, error), "error_kind": kind}


class Worker:
    """A detector in a process of its own, for Dataset.map_batches: addresses in, rows of schema() out.

    Pictures are read by threads while the network runs on those before them.

    Args:
        folder: the working directory that relative paths start from.
        checkpoint, device, precision: as for load_detector.
        thresholds: min_score, max_overlap and top_k.
        batch_size: pictures in the network at a time.
        threads: that read pictures, and that the network uses on a CPU.

    Raises:
        InputError: as load_detector.
    """

    def __init__(
        self,
        folder: str,
        checkpoint: str,
        device: str,
        precision: str,
        thresholds: dict[str, Any],
        batch_size: int,
        threads: int,
    ) -> None:
        os.chdir(folder)
        torch.set_num_threads(threads)
        self.detector = load_detector(checkpoint, device, precision=precision)
        self.thresholds, self.batch_size = thresholds, batch_size
        self.reader, self.threads = PictureReader(), ThreadPoolExecutor(threads)

    def __call__(self, block: Any) -> Any:
        """
        Args:
            block: pyarrow.Table with a column "address".

        Returns:
            pyarrow.Table of schema(), a row for each address in their order.
        """
        import pyarrow as pa  # optional

        rows: list[dict[str, Any]] = []
        reading: list[tuple[str, Future[Image.Image]]] = []
        for batch in batched(block["address"].to_pylist(), self.batch_size):
            ahead = [(address, self.threads.submit(self.reader.load, address)) for address in batch]
            rows += self._detect(reading)
            reading = ahead
        rows += self._detect(reading)
        return pa.Table.from_pylist(rows, schema())

    def _detect(self, reading: Sequence[tuple[str, Future[Image.Image]]]) -> list[dict[str, Any]]:
        """Rows of the pictures of one batch, in their order."""
        rows: dict[str, dict[str, Any]] = {}
        images: dict[str, Image.Image] = {}
        for address, future in reading:
            try:
                images[address] = future.result()
            except Exception as error:  # decoders may raise nearly any exception
                rows[address] = _failed_row(address, error)
        rows |= self._predict(images)
        return [rows[address] for address, _ in reading]

    def _predict(self, images: dict[str, Image.Image]) -> dict[str, dict[str, Any]]:
        """Rows of images by address. If the batch fails, each image is tried on its own."""
        if not images:
            return {}
        try:
            results = self.detector.predict_images(list(images.values()), **self.thresholds)
        except Exception as error:  # caused by the values of one image, or by the device's memory
            if len(images) == 1:
                if not isinstance(error, InputError):
                    raise  # an error of the device: the picture may be read later
                return {address: _failed_row(address, error) for address in images}
            return {key: row for item in images.items() for key, row in self._predict(dict([item])).items()}
        return {address: _row(address, result) for address, result in zip(images, results, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The result


class ResultFolder:
    """A folder of part files, as a context manager. Each part is written atomically: it is renamed when it is complete,
    or put into an object store as a whole. Only one process writes, so that each picture is in one part.

    Args:
        address: of the folder, which is created; local, or remote (see resolve).
        settings: the detector and its thresholds; a folder has results of one setting only.

    Attributes:
        written: rows that were written in this with block.

    Raises:
        InputError: if the folder has other Parquet files or results of other settings, or another process writes to
            it.
    """

    def __init__(self, address: str, settings: dict[str, Any]) -> None:
        self.address, self.settings, self.written = address, settings, 0
        self.is_local = "://" not in address
        self.system, self.path = resolve(address.rstrip("/"))
        self._name = f"part-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"  # of this run's parts
        self._waiting: list[Any] = []
        self._parts, self._last_write = 0, time.monotonic()

    def __enter__(self) -> "ResultFolder":
        self._lock = filelock.FileLock(Path(self.path) / ".lock", timeout=0) if self.is_local else None
        if self._lock:
            Path(self.path).mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                raise InputError(f"another process writes to {self.address}: choose another --out") from None
            for torn in Path(self.path).glob(".part-*"):  # left by a process that was killed
                torn.unlink()
        try:
            for file in self.files():
                self._check_settings(file)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock:
            self._lock.release()

    def files(self) -> list[str]:
        """The part files, as paths of the file system."""
        from pyarrow import fs  # optional

        entries = self.system.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(entry.path for entry in entries if entry.extension == "parquet" and entry.base_name[0] != ".")

    def _check_settings(self, file: str) -> None:
        """Raises InputError for a part file that does not belong to this result."""
        import pyarrow as pa  # optional
        from pyarrow import parquet

        try:
            metadata = parquet.read_metadata(file, filesystem=self.system).metadata or {}
        except pa.ArrowInvalid as error:
            raise InputError(f"{file} is damaged: {error}") from error
        if METADATA_KEY not in metadata:
            raise InputError(f"{file} was not written by bulk_detect.py: choose another --out")
        for name, value in json.loads(metadata[METADATA_KEY]).items():
            if (now := self.settings.get(name)) != value:
                raise InputError(f"{self.address} has results of {name} {value}, not {now}: choose another --out")

    def read(self, *columns: str) -> Any:
        """Yields pyarrow record batches of some columns of all rows."""
        from pyarrow import dataset  # optional

        files = dataset.dataset(self.files(), schema=schema(), format="parquet", filesystem=self.system)
        return files.to_batches(columns=list(columns))

    def left(self, addresses: Iterable[str]) -> Any:
        """The addresses that have no row yet, each once, in their order, as a pyarrow large_string array."""
        import pyarrow as pa  # optional
        from pyarrow import compute

        text = pa.large_string()
        listed = pa.chunked_array((pa.array(some, text) for some in batched(addresses, 100_000)), text).unique()
        done = pa.chunked_array((batch.column(0).cast(text) for batch in self.read("path")), text)
        return listed.filter(compute.invert(compute.is_in(listed, done)))

    def add(self, rows: Any) -> None:
        """Adds rows, a pyarrow.Table of schema(); writes a part file after PART_ROWS rows or PART_SECONDS.

        Raises:
            OSError: if it could not be written; the part does not exist then.
        """
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= PART_ROWS or time.monotonic() - self._last_write >= PART_SECONDS:
            self.write()

    def write(self) -> None:
        """Writes the rows that were added since the last part file; raises as add."""
        import pyarrow as pa  # optional
        from pyarrow import parquet

        self._last_write = time.monotonic()
        if not self._waiting:
            return
        rows = pa.concat_tables(self._waiting).replace_schema_metadata({METADATA_KEY: json.dumps(self.settings)})
        path = f"{self.path}/{self._name}-{self._parts:06d}.parquet"
        if self.is_local:
            with atomic_write(path) as temporary:
                parquet.write_table(rows, temporary)
        else:
            content = io.BytesIO()
            parquet.write_table(rows, content)
            with self.system.open_output_stream(path) as stream:
                stream.write(content.getbuffer())
        self._waiting, self._parts, self.written = [], self._parts + 1, self.written + len(rows)

    def summary(self) -> dict[str, Any]:
        """Of all rows: "pictures", and Counters "errors" by kind and "objects" by class."""
        pictures, errors, objects = 0, Counter[str](), Counter[str]()
        for batch in self.read("names", "error_kind"):
            pictures += len(batch)
            errors.update(kind for kind in batch["error_kind"].drop_null().to_pylist())
            objects.update(batch["names"].flatten().to_pylist())
        return {"pictures": pictures, "errors": errors, "objects": objects}
