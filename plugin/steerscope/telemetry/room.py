"""What the values of all sequences together may take, of those that run and those that ended."""

from __future__ import annotations

from collections.abc import Callable


class Room:
    """A budget of bytes.

    Args:
        max_bytes: all of it.
        free: called when there is too little: gives something back, or returns False.
    """

    def __init__(self, max_bytes: int, free: Callable[[], bool]) -> None:
        self._max_bytes = max_bytes
        self._free = free
        self.num_taken = 0

    def take(self, num_bytes: int) -> bool:
        """Whether there is room for so many more, which are then taken."""
        while self.num_taken + num_bytes > self._max_bytes:
            if not self._free():
                return False
        self.num_taken += num_bytes
        return True

    def charge(self, num_bytes: int) -> None:
        """Take them, room or not, or give them back; what else there is makes room."""
        self.num_taken += num_bytes
        while self.num_taken > self._max_bytes and self._free():
            pass

    def give(self, num_bytes: int) -> None:
        """Give them back."""
        self.num_taken -= num_bytes


class Holding:
    """What one sequence has of the room. It knows of no track, so that tracks are freed at once.

    Args:
        take: grants bytes of the room, or not.
    """

    def __init__(self, take: Callable[[int], bool]) -> None:
        self._take = take
        self.num_taken = 0

    def take(self, num_bytes: int) -> bool:
        """Whether there is room for so many more, which are then taken."""
        is_granted = self._take(num_bytes)
        self.num_taken += num_bytes * is_granted
        return is_granted
