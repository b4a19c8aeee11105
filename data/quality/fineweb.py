"""FineWeb's own rules (Penedo et al., 2024, section 3.5), with the names and limits of datatrove's filter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from config.quality import FineWebConfig
from data.compiled import kernel
from data.quality.characters import TERMINAL, character_classes
from data.quality.lines import characters, stripped
from data.quality.repeats import byte_values, new_seen, range_hash, see, table_size
from data.quality.words import count_words
from data.texts import Texts, decode

RULES = ("empty", "line_punct_ratio", "short_line_ratio", "char_dup_ratio", "list_ratio")
NEWLINE = ord("\n")
OFF = -1.0


def fineweb(texts: Texts, config: FineWebConfig) -> NDArray[np.int8]:
    """For each text the position in `RULES` of the first rule that drops it, or -1."""
    values = [config.line_punct_thr, config.short_line_thr, config.char_duplicates_ratio, config.new_line_ratio]
    limits = np.array([OFF if value is None else value for value in values], np.float64)
    return _judge(
        texts.data,
        texts.offsets,
        character_classes(),
        byte_values(),
        limits,
        config.line_punct_exclude_zero,
        config.short_line_length,
    )


@kernel
def _judge(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint16],
    values: NDArray[np.uint64],
    limits: NDArray[np.float64],
    exclude_zero: bool,
    short_length: int,
) -> NDArray[np.int8]:
    verdicts = np.full(len(offsets) - 1, -1, np.int8)
    seen = new_seen(1 << 10)
    for document in range(len(verdicts)):
        begin, end = offsets[document], offsets[document + 1]
        lines = terminal = short = repeated = total = newlines = 0
        for at in range(begin, end):
            newlines += data[at] == NEWLINE
        size = table_size(newlines + 1)
        if size > len(seen.keys):
            seen = new_seen(size)
        seen.stamp[0] += 1
        at = begin
        while at <= end:
            stop = at
            while stop < end and data[stop] != NEWLINE:
                stop += 1
            length = characters(data, at, stop)
            total += length
            first, last = stripped(data, at, stop, classes)
            if first < last:
                lines += 1
                short += length <= short_length
                step = stop - 1
                while data[step] & 0xC0 == 0x80:
                    step -= 1
                terminal += classes[decode(data, step)[0]] & TERMINAL != 0
                if see(seen, range_hash(data, at, stop, values), size):
                    repeated += length
            at = stop + 1
        if not lines:
            verdicts[document] = 0
            continue
        ratio = terminal / lines
        if limits[0] >= 0 and ratio < limits[0] and not (terminal == 0 and exclude_zero):
            verdicts[document] = 1
        elif limits[1] >= 0 and short / lines > limits[1]:
            verdicts[document] = 2
        elif limits[2] >= 0 and repeated / total > limits[2]:
            verdicts[document] = 3
        elif limits[3] >= 0 and newlines / count_words(data, begin, end, classes) > limits[3]:
            verdicts[document] = 4
    return verdicts
