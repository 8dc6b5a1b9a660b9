"""Child of ``test_lab_on_engine.py``: captures streams through the engine."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from commands import ENGINE
from safetensors.numpy import save_file
from steerscope.catalog import authoring
from steerscope.catalog.model import Site
from steerscope.catalog.store import SiteKey
from steerscope.lab import cases
from steerscope.lab.bench import Bench
from steerscope.lab.capture import captured, write_capture_catalog

SITES = [SiteKey(1, Site.RESID_POST), SiteKey(4, Site.RESID_POST)]


def main(model: Path, asked: Path, out: Path) -> None:
    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        catalog = Path(folder) / "capture"
        write_capture_catalog(catalog, authoring.fingerprint_of(model), SITES)
        with Bench(model, catalog, max_tokens=8, engine_args=ENGINE) as bench:
            for i, answer in enumerate(bench.ask(cases.load(asked))):
                streams = captured(answer.track, SITES)
                length = len(next(iter(streams.values())))
                ids = (*answer.prompt_token_ids, *answer.token_ids)[:length]
                tensors[f"{i}.ids"] = np.array(ids, np.int64)
                tensors |= {f"{i}.{key}": np.array(x) for key, x in streams.items()}
    save_file(tensors, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
