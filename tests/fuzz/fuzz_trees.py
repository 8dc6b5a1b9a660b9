"""Nearly valid inputs: a seed becomes a tree, one spot of it changes, it becomes bytes again.

Plain bytes get no further than a format's first brackets. Each codec turns the bytes of one
boundary into plain data and back, so that what is mutated is a field, not a quotation mark.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import yaml

MAX_DEPTH = 12
"""How deep a codec looks; what is deeper stays as it is."""

INTERESTING: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 15, 16, 17, 63, 64, 255, 4096, 2**24, 2**31 - 1, 2**31, 2**32,
    2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-300, 1e38, 1e308,
    float("inf"), float("-inf"), float("nan"), "", "\0", "\n", " ", "*", "a", "known", "unknown",
    "late", "known\n", "features/known", "policies/force-known", "\ud800", "é", "x" * 300, "NaN",
    "0", "-1", "1e999", "../x", "9999-99-99T99:99:99.999999Z", [], {}, [[]], [None], {"": None},
    [0, 0], [0, 2**63], [1, 0], [-1, 1],
)  # fmt: skip


class Codec(NamedTuple):
    """From bytes to a tree (``ValueError`` if there is none) and back."""

    read: Callable[[bytes], Any]
    write: Callable[[Any, random.Random], bytes]


def mutated(data: bytes, codec: Codec, pool: list[Any], rng: random.Random) -> bytes | None:
    """The input with one or two spots changed; None if it is no tree."""
    try:
        tree = codec.read(data)
        for _ in range(rng.choice((1, 1, 1, 2))):
            tree = _changed(tree, pool, rng)
        return codec.write(tree, rng)
    except Exception:  # a codec's library may raise anything on what is no tree
        return None


def subtrees(tree: Any, depth: int = 0) -> Iterator[Any]:
    """The tree and all in it: what mutations may put elsewhere."""
    yield tree
    if depth < MAX_DEPTH:
        for part in tree.values() if isinstance(tree, dict) else tree if _is_list(tree) else ():
            yield from subtrees(part, depth + 1)


def _is_list(tree: Any) -> bool:
    return isinstance(tree, list | tuple)


def _changed(tree: Any, pool: list[Any], rng: random.Random, depth: int = 0) -> Any:
    """A copy in which one node differs; deeper ones are as likely as others."""
    inside = bool(tree) and isinstance(tree, dict | list | tuple) and depth < MAX_DEPTH
    if not inside or rng.random() < (0.12 if depth else 0.01):
        return _replaced(tree, pool, rng)
    if isinstance(tree, dict):
        return _changed_dict(tree, pool, rng, depth)
    parts, at = list(tree), rng.randrange(len(tree))
    match rng.randrange(8):
        case 0:
            del parts[at]
        case 1:
            parts.insert(at, rng.choice(pool))
        case 2:
            parts.insert(rng.randrange(len(parts) + 1), parts[at])
        case 3:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        case _:
            parts[at] = _changed(parts[at], pool, rng, depth + 1)
    return parts


def _changed_dict(
    tree: dict[Any, Any], pool: list[Any], rng: random.Random, depth: int
) -> dict[Any, Any]:
    parts, key = dict(tree), rng.choice(list(tree))
    match rng.randrange(10):
        case 0:
            del parts[key]
        case 1:
            keys = [k for found in pool if isinstance(found, dict) for k in found] or ["x"]
            parts[rng.choice(keys)] = rng.choice(pool)
        case 2:
            parts = {rng.choice(("x", f"{key}\n", "", key)) if k == key else k: v
                     for k, v in parts.items()}  # fmt: skip
        case _:
            parts[key] = _changed(parts[key], pool, rng, depth + 1)
    return parts


def _replaced(tree: Any, pool: list[Any], rng: random.Random) -> Any:
    match rng.randrange(8):
        case 0 | 1 | 2:
            return rng.choice(INTERESTING)
        case 3 | 4:
            return rng.choice(pool) if pool else tree
        case 5 if isinstance(tree, str) and tree:
            at = rng.randrange(len(tree))
            return tree[:at] + rng.choice(("", "\n", '"', "\\", tree, "é", "1")) + tree[at + 1 :]
        case 5 | 6 if isinstance(tree, bytes):
            return _changed_bytes(tree, rng)
        case 5 | 6 if isinstance(tree, int | float):
            return rng.choice((tree + 1, tree - 1, -tree, tree * 2, float(tree), str(tree)))
        case _:
            nested = tree
            for _ in range(rng.choice((1, 1, 2, 50, 1200))):
                nested = [nested]
            return nested


def _changed_bytes(data: bytes, rng: random.Random) -> bytes:
    some = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 8))))
    at = rng.randrange(len(data) + 1)
    return data[:at] + some + data[at + rng.choice((0, len(some))) :]


def _json_text(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=True, default=repr).encode()


def _write_yaml(tree: Any, rng: random.Random) -> bytes:
    if rng.random() < 0.7:
        return _json_text(tree)
    text = yaml.dump(tree, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    return text.encode("utf-8", "surrogatepass")


def _read_lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def _write_lines(tree: Any, rng: random.Random) -> bytes:
    lines = tree if isinstance(tree, list) else [tree]
    return b"".join(_json_text(line) + b"\n" for line in lines)


def _write_chain(tree: Any, rng: random.Random) -> bytes:
    """Lines of the audit log; mostly chained anew, so that what follows a change is reached."""
    anew, written, previous = rng.random() < 0.7, b"", "0" * 64
    for number, line in enumerate(tree if isinstance(tree, list) else [tree], 1):
        if anew and isinstance(line, dict):
            line = line | {"previous": previous, "seq": number}
        text = json.dumps(line, separators=(",", ":"), default=repr).encode()
        written, previous = written + text + b"\n", hashlib.sha256(text).hexdigest()
    return written


def _read_tensors(data: bytes) -> list[Any]:
    (size,) = struct.unpack("<Q", data[:8])
    return [json.loads(data[8 : 8 + size]), data[8 + size :]]


def _write_tensors(tree: Any, rng: random.Random) -> bytes:
    header, data = tree if isinstance(tree, list) and len(tree) == 2 else (tree, b"")
    text = _json_text(header)
    size = len(text) if rng.random() < 0.95 else rng.choice((0, 1, 2**31, 2**63, len(text) + 9))
    return struct.pack("<Q", size) + text + (data if isinstance(data, bytes) else b"")


def fields(data: bytes) -> list[tuple[int, int, Any]]:
    """A protobuf message as (field, wire type, value); ``ValueError`` if it is none."""
    at, found = 0, []
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 5):
            value, at = data[at : at + (8 if wire == 1 else 4)], at + (8 if wire == 1 else 4)
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("no wire type of ours")
        if at > len(data) or not number:
            raise ValueError("cut off")
        found.append((number, wire, value))
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("no varint")
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 128:
            return value, at


def varint(value: int) -> bytes:
    """As protobuf writes it, negative ones in ten bytes."""
    value &= 2**64 - 1
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _read_proto(data: bytes, depth: int = 0) -> list[Any]:
    tree: list[Any] = []
    for number, wire, value in fields(data):
        if wire == 2 and depth < 6:
            try:
                value = value.decode() if value.isascii() and value[:1].isalpha() else value
                value = _read_proto(value, depth + 1) if isinstance(value, bytes) else value
            except (ValueError, UnicodeDecodeError):
                pass
        elif wire == 1:
            (value,) = struct.unpack("<d", value)
        tree.append([number, value])
    return tree


def _write_proto(tree: Any, rng: random.Random | None = None) -> bytes:
    out = b""
    for entry in tree:
        number, value = entry if _is_list(entry) and len(entry) == 2 else (1, entry)
        number = number if isinstance(number, int) and 0 < number < 2**29 else 1
        if isinstance(value, float):
            out += varint(number << 3 | 1) + struct.pack("<d", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            text = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            inner = text if isinstance(text, bytes) else _write_proto(text or ())
            out += varint(number << 3 | 2) + varint(len(inner)) + inner
    return out


_TOKENS = re.compile(r"\w+|\s+|.", re.DOTALL)


def _read_yaml(data: bytes) -> Any:
    if data.count(b"[") + data.count(b"{") + data.count(b"- ") > 200 or b"*" in data:
        raise ValueError("too deep, or with aliases that would be followed")
    return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


JSON = Codec(lambda data: json.loads(data), lambda tree, rng: _json_text(tree))
YAML = Codec(_read_yaml, _write_yaml)
LINES = Codec(_read_lines, _write_lines)
CHAIN = Codec(_read_lines, _write_chain)
MSGPACK = Codec(msgspec.msgpack.decode, lambda tree, rng: msgspec.msgpack.encode(tree))
TENSORS = Codec(_read_tensors, _write_tensors)
CURSOR = Codec(
    lambda data: msgspec.msgpack.decode(base64.urlsafe_b64decode(data + b"==")),
    lambda tree, rng: base64.urlsafe_b64encode(msgspec.msgpack.encode(tree)).rstrip(b"="),
)
PROTO = Codec(_read_proto, _write_proto)
TEXT = Codec(
    lambda data: _TOKENS.findall(data.decode()),
    lambda tree, rng: "".join(map(str, tree)).encode("utf-8", "surrogatepass"),
)
