"""What ``bench.py`` found, in Markdown: tables, and what costs come to as work grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ratios

Found = Mapping[str, Any]


def markdown(kept: Found) -> str:
    """The whole page."""
    machine = kept["machine"]
    load = ", ".join(f"{each:.2f}" for each in machine["load_average"])
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    lines = [
        f"Commit {machine['commit']}, {machine['date']}, {machine['cpu']}, {versions}, "
        f"load before the start {load}. One thread per engine, {kept['seconds']:g} s for each "
        "engine and kind of work. Ratios are Steerscope over plain compiled vLLM (95% interval); "
        "throughput below 1 and latency above 1 is a loss."
    ]
    for name, found in kept["models"].items():
        if found.get("engines"):
            lines += ["", f"### {name}: engines", "", *_engines(found["engines"])]
            lines += ["", *_slopes(found["engines"])]
        if found.get("served"):
            lines += ["", f"### {name}: over HTTP", "", *_served(found["served"])]
        if found.get("toggled"):
            lines += ["", f"### {name}: one engine, with and without in turn", ""]
            lines += toggled(found["toggled"])
    return "\n".join(lines)


def _engines(columns: Found) -> Iterable[str]:
    sizes = list(next(iter(columns.values()))["decode"])
    decode: list[tuple[str, Callable[[Found], str]]] = [
        ("throughput", lambda cell: _ratio(cell["throughput"])),
        ("trimmed", lambda cell: _ratio(cell["trimmed"])),
        ("by processor time", lambda cell: _ratio(cell["processor"])),
        ("ITL p50", lambda cell: _ratio(cell["itl_p50"])),
        ("ITL p99", lambda cell: _ratio(cell["itl_p99"])),
        ("own µs", lambda cell: _number(cell["own_us"])),
    ]
    for size in sizes:
        yield from (f"Decoding, {size} at a time:", "")
        rows = {
            name: [cell(found["decode"][size]) for _, cell in decode]
            for name, found in columns.items()
        }
        yield from (*_table([title for title, _ in decode], rows), "")
    cached = next(iter(columns.values()))["prefix"]["cached_tokens"]["plain"][-1]
    yield f"First token after 1,024 tokens, all new and {cached} of them cached; memory:"
    yield ""
    titles = ["p50", "p99", "cached: p50", "p99", "engine, more than plain", "hub"]
    yield from _table(titles, {name: _rest(found) for name, found in columns.items()})


def _rest(found: Found) -> list[str]:
    keys = ("ttft_p50", "ttft_p99")
    cells = [_ratio(found[work][key]) for work in ("prefill", "prefix") for key in keys]
    return [*cells, *(f"{found['memory'][key] / 1e6:.0f} MB" for key in ("engine_more", "hub"))]


def _served(columns: Found) -> Iterable[str]:
    keys = ("throughput", "trimmed", "itl_p50", "itl_p99", "ttft_p50", "ttft_p99")
    titles = [key.replace("_", " ").replace("itl", "ITL").replace("ttft", "TTFT") for key in keys]
    rows = {
        f"{name}, {size} at a time": [_ratio(cell[key]) for key in keys]
        for name, cells in columns.items()
        for size, cell in cells.items()
    }
    return _table(titles, rows)


def toggled(columns: Found) -> Iterable[str]:
    """What ``toggled.py`` found; throughput is without the tenth of the turns at either end."""
    rows = {
        f"{name}, {size} at a time": [
            *(_ratio(cell[key]) for key in ("throughput", "itl_p99")),
            *(_number(cell[key]) for key in ("plain_step_us", "extra_us")),
        ]
        for name, cells in columns.items()
        for size, cell in cells.items()
    }
    return _table(["throughput", "ITL p99", "plain step, µs", "more, µs"], rows)


def _slopes(columns: Found) -> Iterable[str]:
    """Own host time, and all that a step takes longer (which holds the op), as work grows."""
    sizes = list(next(iter(columns.values()))["decode"])
    rows = {}
    for name in ("observe-64", "steer-64"):
        if name in columns:
            cells = [columns[name]["decode"][size] for size in sizes]
            rows[f"{name}, by request"] = _growth([float(size) for size in sizes], cells)
    families = (
        ("by feature", r"observe-(\d+)"),
        ("by layer, 64 features", r"observe-64(?:x(\d+))?"),
        ("by policy", r"steer-(\d+)"),
    )
    for title, pattern in families:
        known = {
            float(match[1] or 1): found["decode"][sizes[-1]]
            for name, found in columns.items()
            if (match := re.fullmatch(pattern, name))
        }
        if len(known) > 1:
            rows[f"{title}, {sizes[-1]} requests"] = _growth(list(known), list(known.values()))
    return _table(["at", "own µs", "own µs, slope", "all µs", "all µs, slope"], rows)


def _growth(sizes: list[float], cells: list[Found]) -> list[str]:
    row = [", ".join(f"{size:g}" for size in sizes)]
    for key in ("own_us", "extra_us"):
        costs = [cell[key] for cell in cells]
        slope = ratios.slope(sizes, costs)
        row += [", ".join(map(_number, costs)), "-" if slope is None else f"{slope:.3f}"]
    return row


def _table(titles: list[str], rows: Mapping[str, list[str]]) -> Iterable[str]:
    yield f"| | {' | '.join(titles)} |"
    yield "| --- " * (len(titles) + 1) + "|"
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join(cells)} |"


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['value']:.4f} ({found['low']:.4f}-{found['high']:.4f})"


def _number(found: float | None) -> str:
    return "-" if found is None else f"{found:.0f}"
