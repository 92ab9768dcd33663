"""Video in and out: clips with true times, readers, writers."""

from stvision.io.clip import AudioTrack, Clip
from stvision.io.convert import as_clip
from stvision.io.pictures import save_clip, write_frames, write_gif, write_strip
from stvision.io.reader import BACKENDS, FrameError, VideoReader, open_video, read_clip
from stvision.io.writer import VideoWriter, write_video

__all__ = [
    "BACKENDS",
    "AudioTrack",
    "Clip",
    "FrameError",
    "VideoReader",
    "VideoWriter",
    "as_clip",
    "open_video",
    "read_clip",
    "save_clip",
    "write_frames",
    "write_gif",
    "write_strip",
    "write_video",
]
