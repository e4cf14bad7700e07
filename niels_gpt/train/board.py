"""The same figures for TensorBoard, in `runs/<id>/tensorboard/`, where its library is installed (extra `board`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HINT = "no TensorBoard files: its library is not installed; for them: pip install 'niels-gpt[board]'"
QUEUE = 1000  # events; a thread of the library writes them
FLUSH_SECONDS = 5.0

_hinted: list[str] = []  # once per process


class Board:
    """Writes one run's event files; an error of the disk ends that with one warning, and never the training."""

    def __init__(self, folder: Path, after_step: int, warn: Callable[[str], None]) -> None:
        """after_step: what older files say of later steps is forgotten. ImportError where the library is not there."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._Event, self._Summary, self._SummaryMetadata, self._Tensor = Event, Summary, SummaryMetadata, TensorProto
        self._folder, self._warn = folder, warn
        resumed = folder.is_dir() and any(folder.iterdir())
        self._writer: EventFileWriter | None = EventFileWriter(str(folder), QUEUE, FLUSH_SECONDS)
        self._restart = SessionLog(status=SessionLog.START)
        if resumed:
            self.forget_after(after_step)

    def forget_after(self, step: int) -> None:
        """Later steps will be written again; readers drop what they had of them (`purge_step` of other writers)."""
        self._add(self._Event(step=step + 1, wall_time=time.time(), session_log=self._restart))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """tag -> value, all of one step."""
        Value = self._Summary.Value
        summary = self._Summary(value=[Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._add(self._Event(step=step, wall_time=time.time(), summary=summary))

    def text(self, step: int, tag: str, text: str) -> None:
        """A text, shown as Markdown."""
        metadata = self._SummaryMetadata(plugin_data=self._SummaryMetadata.PluginData(plugin_name="text"))
        tensor = self._Tensor(dtype="DT_STRING", string_val=[text.encode()])
        value = self._Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self._add(self._Event(step=step, wall_time=time.time(), summary=self._Summary(value=[value])))

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._warn(f"TensorBoard files in {self._folder} are not complete: {error.strerror or error}")

    def _add(self, event: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.add_event(event)
        except OSError as error:  # of the library's thread, which has ended
            self._writer = None
            self._warn(f"no more TensorBoard files in {self._folder}: {error.strerror or error}; training goes on")


def open_board(
    folder: Path, after_step: int, *, say: Callable[[str], None], warn: Callable[[str], None]
) -> Board | None:
    """A board, or None and a hint if the library is not there."""
    try:
        return Board(folder, after_step, warn)
    except ImportError:
        if not _hinted:
            _hinted.append(HINT)
            say(HINT)
    except OSError as error:
        warn(f"no TensorBoard files in {folder}: {error.strerror or error}")
    return None
