"""Closing the gaps that leaving documents make in what others keep."""

from collections.abc import Collection


def compacted(num_places: int, leaving: Collection[int]) -> list[int]:
    """Return the old place of what stands at each place once some have left, moving few.

    The last ones fill the gaps, and all others stay where they are.

        compacted(5, {1})  # [0, 4, 2, 3]
    """
    gone = set(leaving)
    staying = [place for place in range(num_places) if place not in gone]
    late = (place for place in staying if place >= len(staying))
    return [place if place not in gone else next(late) for place in range(len(staying))]
