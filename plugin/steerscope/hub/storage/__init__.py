"""Where created policies and rules are kept: in an SQLite file, or in a Redis for a fleet."""

from __future__ import annotations

from pathlib import Path

from steerscope import config
from steerscope.config import StateSettings
from steerscope.hub.storage.documents import PolicyStorage, StateError
from steerscope.hub.storage.sqlite import SqliteStorage

STATE_FILE = "state.db"


def storage_for(settings: StateSettings, endpoint: Path) -> PolicyStorage:
    """The place that the settings name, not yet open; without one, a file for this launch."""
    if settings.sqlite is not None:
        return SqliteStorage(Path(settings.sqlite))
    if settings.redis is None:
        return SqliteStorage(endpoint / STATE_FILE)
    try:
        from steerscope.hub.storage.redis import RedisStorage
    except ImportError:
        message = "state.redis: needs the redis package: pip install 'steerscope[redis]'"
        raise StateError(message) from None
    redis = settings.redis
    return RedisStorage(redis.url, redis.prefix, config.redis_password(redis))
