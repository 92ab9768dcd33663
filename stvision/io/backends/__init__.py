"""Decoders behind one interface (``stvision.io.reader.VideoReader``), one file each."""
