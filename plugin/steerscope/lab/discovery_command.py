"""The ``lab discover`` command: plan, run, write catalog and report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from steerscope.catalog import authoring
from steerscope.catalog.model import Fingerprint, LabelSlug, Site
from steerscope.catalog.store import SiteKey
from steerscope.errors import LabError
from steerscope.lab import cases as case_files
from steerscope.lab import findings, report, saes
from steerscope.lab.capture import parse_site
from steerscope.lab.dictionaries import DictionarySettings
from steerscope.lab.discover import Dictionaries, Plan, discover
from steerscope.lab.judging import Judge

CATALOG, SAES = "catalog", "saes"
SEEDS = (0, 1)


def run(arguments: argparse.Namespace, judge: Judge, told: Callable[[str], None]) -> int:
    """``--out`` becomes a folder with the catalog, the report and any dictionary trained."""
    model = authoring.fingerprint_of(arguments.model)
    catalog = arguments.out / CATALOG
    opposite = arguments.opposite or f"not_{arguments.name}"
    names = [arguments.name, opposite, f"{arguments.name}_probe", f"{arguments.name}_gate"]
    findings.check_names(names, catalog, arguments.append)
    label = _label(arguments.label or arguments.name)
    keys = _keys(arguments.site, model)
    dictionaries = _dictionaries(arguments, model, keys, told)
    plan = Plan(
        model=arguments.model,
        positive=case_files.load(arguments.positive),
        negative=case_files.load(arguments.negative),
        side=case_files.load(arguments.side) if arguments.side else (),
        keys=keys,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        engine_args=arguments.vllm,
    )
    found = discover(plan, judge, dictionaries, told)
    report.write_discovery(arguments.out, found, findings.tree(found))
    written = findings.Findings(found, arguments.name, opposite, label)
    written.write(catalog, append=arguments.append)
    print(f"{catalog}: {written.feature_name}")
    print(arguments.out / "DISCOVERY.md")
    return 0


def _label(label: str) -> str:
    try:
        return msgspec.convert(label, LabelSlug)
    except msgspec.ValidationError as error:
        raise LabError(f"--label {label!r}: {error}") from None


def _keys(sites: Sequence[str] | None, model: Fingerprint) -> list[SiteKey]:
    if sites is None:
        return [SiteKey(layer, Site.RESID_POST) for layer in range(model.num_hidden_layers)]
    try:
        keys = [parse_site(site) for site in sites]
    except ValueError as error:
        raise LabError(f"--site: {error}") from None
    for key in keys:
        if key.layer >= model.num_hidden_layers:
            raise LabError(f"--site: {key}: the model has {model.num_hidden_layers} layers")
    return keys


def _dictionaries(
    arguments: argparse.Namespace,
    model: Fingerprint,
    keys: Sequence[SiteKey],
    told: Callable[[str], None],
) -> Dictionaries:
    if arguments.sae:
        opened = [saes.open_dictionary(reference, model) for reference in arguments.sae]
        for dictionary in opened:
            if dictionary.key not in keys:
                raise LabError(f"--sae: it reads {dictionary.key}, which no --site captures")
        return lambda seen, found: opened
    if (arguments.out / SAES).exists():
        raise LabError(f"{arguments.out / SAES}: exists already; give them with --sae")
    settings = [DictionarySettings(seed=arguments.seed + seed) for seed in SEEDS]
    name = Path(arguments.model).name
    return saes.trained(settings, arguments.num_train, told, arguments.out / SAES, name)
