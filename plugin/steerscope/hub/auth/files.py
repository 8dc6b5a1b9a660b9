"""Files that are read again when they change.

They are looked at now and then, without inotify: neither network file systems nor mounted
secrets always bring it.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from steerscope.errors import ConfigError

MAX_BYTES = 4 * 1024 * 1024

_log = logging.getLogger(__name__)


class WatchedFiles(ABC):
    """Files that make one thing. Reads them when made; raises ``ConfigError`` if they are broken.

    Attributes:
        problem: empty, or that newer files are broken and older ones are in force. It names the
            setting only, since health shows it to everyone; the log says the rest.
    """

    def __init__(self, setting: str, paths: Sequence[str]) -> None:
        self.problem = ""
        self._setting = setting
        self._paths = tuple(map(Path, paths))
        self._seen: tuple[bytes | str, ...] = self._contents()
        self.take(self._whole(self._seen))

    @abstractmethod
    def take(self, contents: tuple[bytes, ...]) -> None:
        """Put the files' contents in force, all or nothing; raise ``ConfigError`` if broken."""

    def refresh(self) -> None:
        """Take the files if they changed; if they are broken, say so once and keep the old."""
        contents = self._contents()
        if contents == self._seen:
            return
        try:
            self.take(self._whole(contents))
        except ConfigError as error:
            self.problem = f"{self._setting}: the new file is broken, the old one is in force"
            _log.error("%s; the old one stays in force", error)
        else:
            self.problem = ""
            _log.info("%s: read again", self._setting)
        self._seen = contents

    def _contents(self) -> tuple[bytes | str, ...]:
        """Each file's bytes, or why there are none."""
        return tuple(map(_read, self._paths))

    def _whole(self, contents: tuple[bytes | str, ...]) -> tuple[bytes, ...]:
        for path, content in zip(self._paths, contents, strict=True):
            if isinstance(content, str):
                raise ConfigError(f"{self._setting}: {path}: {content}")
        return tuple(content for content in contents if isinstance(content, bytes))


async def refresh_often(
    watched: Sequence[WatchedFiles], seconds: float, tell: Callable[[bool], Awaitable[None]]
) -> None:
    """Look at the files for ever, and each time tell whether all in force are the newest."""
    while True:
        await asyncio.sleep(seconds)
        for files in watched:
            files.refresh()
        await tell(not any(files.problem for files in watched))


def _read(path: Path) -> bytes | str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        return error.strerror or str(error)
    return content if len(content) <= MAX_BYTES else f"larger than {MAX_BYTES} bytes"
