"""What the optional backends share: times come from the packet index, pixels from the library."""

from __future__ import annotations

from typing import Any

from stvision.io.index import build_index
from stvision.io.reader import VideoReader, audio_track, default_threads
from stvision.io.source import describe


class IndexedReader(VideoReader):
    """Index, times, sound and error sentences of a reader whose decoder is another library."""

    def __init__(self, source: Any, threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self.name = describe(source)
        self.threads = default_threads() if threads is None else threads
        index = build_index(source)
        self.codec, self.truncated = index.codec, index.truncated
        self.times, self.fps = index.times, index.rate
        self.audio = audio_track(source, index.audio_streams)

    def _refusal(self, backend: str, error: BaseException) -> ValueError:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        return ValueError(
            f"{self.name}: {backend} cannot read this {self.codec} file ({cause[0][:160]}); "
            "backend='pyav' may"
        )

    def _check_length(self, length: int, backend: str) -> None:
        if length != len(self.times):
            self.close()
            raise ValueError(
                f"{self.name}: {backend} counts {length} frames, the file's packets "
                f"{len(self.times)}; use backend='pyav'"
            )
