"""The bits of a bitmap as a bitmap of another granularity has them."""

from __future__ import annotations

from safeimg.drivers.formats.features import BitmapBits

PIECE = 1 << 20  # bytes of the finer bitmap looked at in one go
PIECE_BITS = 1 << 19  # bits of the coarser one


def read_as(source: BitmapBits, granularity: int, start: int, length: int) -> bytes:
    """Bytes `start`… of the source as a bitmap of `granularity` has them: a bit is set if any byte that it stands for
    is dirty in the source. What bits behind the end of the source say is not defined."""
    if source.granularity == granularity:
        return source.read(start, length)
    import numpy

    first, end = 8 * start, 8 * (start + length)
    if source.granularity > granularity:
        factor = source.granularity // granularity
        parts = []
        for at in range(first, end, PIECE_BITS):
            stop = min(at + PIECE_BITS, end)
            low = at // factor // 8
            stored = source.read(low, (stop - 1) // factor // 8 + 1 - low)
            bits = numpy.unpackbits(numpy.frombuffer(stored, numpy.uint8), bitorder="little")
            parts.append(bits[numpy.arange(at, stop) // factor - 8 * low])
    else:
        factor = granularity // source.granularity
        finest = -(-source.size // source.granularity)  # the source has no more bits
        parts = [numpy.zeros(end - first, numpy.uint8)]
        step = max(8, 8 * PIECE // factor)
        for at in range(first, min(end, -(-finest // factor)), step):
            stop = min(at + step, end)
            stored = source.read(at * factor // 8, (stop - at) * factor // 8)
            if stored.count(0) == len(stored):
                continue
            cells = numpy.frombuffer(stored, numpy.uint8)
            if factor < 8:
                cells = numpy.unpackbits(cells, bitorder="little")
            parts[0][at - first : stop - first] = cells.reshape(stop - at, -1).any(axis=1)
    return numpy.packbits(numpy.concatenate(parts), bitorder="little").tobytes()
