"""Which packet is which frame: presentation numbers from packet timestamps, without decoding."""

from itertools import pairwise
from typing import Any

REORDER_LIMIT = 32  # a frame is shown at most this many places away from its place in the file (the codecs: 16)


class PacketScan:
    """The packets of a video stream in file order, read until the numbers of the frames first..last are certain.

    Reading starts at a keyframe safely in front of frame `first` where the container has an index of all its packets
    (mp4, mov); otherwise, and with `from_start`, at the start of the file. Packets that cannot matter are forgotten.

    `numbered` is False where timestamps are absent or equal, so that frames must be counted by decoding. `total` is the
    number of packets up to here, `shown_total` the number of those that a player shows (the others are cut away by an
    edit list), `complete` tells that the end was reached. `index` holds the container's index entries and `stored` the
    number of frames by its header, where these can be trusted.
    """

    def __init__(self, container: Any, stream: Any, first: int, last: int, from_start: bool) -> None:
        indexed = "mov" in container.format.name.split(",")
        self.index = list(stream.index_entries) if indexed else []
        self.stored = max(stream.frames, len(self.index)) if indexed else 0
        self.numbered = True
        self.complete = False
        self.total = 0
        self._first, self._last, self._from_start = first, last, from_start
        self._shown: list[int] = []  # timestamps, of the packets from the start of reading on
        self._shown_before = 0  # frames shown in front of these
        self._shown_behind = 0  # and behind these
        self._keyframes: list[tuple[int, int]] = []  # (timestamp, place in the file), of the kept packets
        self._places: dict[int, int] = {}  # timestamp -> place in the file, of the kept packets
        self._kept: list[Any] = []
        self._kept_from = 0
        self._in_order = True  # so far, decoding times rise and no frame is shown before it is decoded
        self._previous_dts: int | None = None
        sought = not from_start and self._seek(container, stream)
        self._packets = container.demux(stream)
        for packet in self._packets:
            if sought:
                self._land(packet)
                sought = False
            if not self._add(packet) or self._certain(packet):
                break

    @property
    def shown_total(self) -> int:
        return self._shown_before + len(self._shown) + self._shown_behind

    def read_to_end(self) -> None:
        """Count the rest of the packets."""
        for packet in self._packets:
            if _ends(packet):
                self.complete = True
                break
            self.total += 1
            self._shown_behind += not packet.is_discard

    def timestamps(self, indices: tuple[int, ...]) -> list[int]:
        """Timestamps of the frames with the given numbers, from `first` to `last`."""
        ordered = sorted(self._shown)
        return [ordered[index - self._shown_before] for index in indices]

    def packets(self, timestamps: list[int]) -> list[Any]:
        """The packets to decode, in file order, to get the frames of the given timestamps (ascending).

        Frames shown from a keyframe on never refer to anything in front of it (also with open GOPs), so they begin at
        the last keyframe that is shown at or before the first frame; empty if no such keyframe was read.
        """
        start = 0
        if not self._from_start:
            usable = [(pts, place) for pts, place in self._keyframes if pts <= timestamps[0]]
            if not usable:
                return []
            start = max(usable)[1] - self._kept_from
        stop = max(self._places[pts] for pts in timestamps) + 1 - self._kept_from
        return self._kept[start:stop]

    def _seek(self, container: Any, stream: Any) -> bool:
        """Seek to a keyframe safely in front of frame `first`; False where there is none, or no trustworthy index."""
        times = [entry.timestamp for entry in self.index]
        if any(later <= earlier for earlier, later in pairwise(times)):
            return False
        shown, target = 0, None
        for entry in self.index:
            if shown > self._first - REORDER_LIMIT:
                break
            if entry.is_keyframe and shown:
                target = entry.timestamp
            shown += not entry.is_discard
        if target is None:
            return False
        container.seek(target, stream=stream)  # arrives there, or (with B-frames) one keyframe earlier
        return True

    def _land(self, packet: Any) -> None:
        """Find the place in the file of the first packet after seeking.

        Frames in front of a keyframe in the file are shown before all that follow it in the file, so the number of
        shown index entries in front of it numbers the frames from there on.
        """
        places = [place for place, entry in enumerate(self.index) if entry.pos == packet.pos]
        self.numbered = len(places) == 1 and self.index[places[0]].is_keyframe
        if self.numbered:
            self.total = self._kept_from = places[0]
            self._shown_before = sum(not entry.is_discard for entry in self.index[: self.total])

    def _add(self, packet: Any) -> bool:
        """Note one packet; False at the end of the stream or where the timestamps turn out to be useless."""
        if _ends(packet):
            self.complete = True
            self.numbered = self.numbered and len(set(self._shown)) == len(self._shown)
            return False
        self.numbered = self.numbered and packet.pts is not None
        if not self.numbered:
            return False
        if packet.is_keyframe and (not packet.is_discard or self.total == 0):
            if self.shown_total <= self._first - REORDER_LIMIT and not self._from_start:
                self._kept, self._keyframes, self._places, self._kept_from = [], [], {}, self.total
            self._keyframes.append((packet.pts, self.total))
        self._places[packet.pts] = self.total
        self._kept.append(packet)
        if not packet.is_discard:
            self._shown.append(packet.pts)
        dts = packet.dts
        late = dts is None or dts > packet.pts or (self._previous_dts is not None and dts < self._previous_dts)
        self._in_order = self._in_order and not late
        self._previous_dts = dts
        self.total += 1
        return True

    def _certain(self, packet: Any) -> bool:
        """Whether no packet behind this one can be shown before frame `last`; looked at every 16 packets."""
        if not self._in_order or self.total % 16 or self.shown_total <= self._last:
            return False
        ordered = sorted(self._shown)
        if packet.dts <= ordered[self._last - self._shown_before]:
            return False
        self.numbered = len(set(ordered)) == len(ordered)
        return True


def _ends(packet: Any) -> bool:
    """Whether this is PyAV's mark for the end of a stream."""
    return packet.dts is None and packet.size == 0
