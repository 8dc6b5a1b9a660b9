"""Features of a published dictionary, probe or set of directions, as a catalog has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from steerscope.catalog import authoring
from steerscope.catalog.formats import FORMATS, Columns, Options, Source, open_source
from steerscope.catalog.model import (
    SCHEMA,
    Activation,
    CatalogDocument,
    Dictionary,
    Feature,
    Fingerprint,
    LabelSource,
    Slug,
)
from steerscope.catalog.store import Catalog, DictionaryVectors, FeatureVectors
from steerscope.errors import CatalogError

FIRST_VERSION = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A feature someone wants: its name, and where it is in the source.

    Attributes:
        layer: for sources of several layers; None leaves it to the options.
        latent: a number, or a name that the source has.
    """

    name: str
    latent: str
    layer: int | None = None
    label: str = ""
    label_source: LabelSource = LabelSource.HUMAN

    @classmethod
    def parse(cls, told: str, format: str) -> Pick:
        """Of ``NAME=INDEX``, ``NAME=LAYER/INDEX``, or ``NAME=LAYER`` in a format by layer."""
        name, equals, latent = told.partition("=")
        if not equals or not latent:
            raise CatalogError(f"--feature {told!r}: expected NAME=INDEX")
        if FORMATS[format].by_layer:
            if not latent.isdecimal():
                raise CatalogError(f"--feature {told!r}: expected NAME=LAYER")
            return cls(name=name, latent="0", layer=int(latent))
        if found := re.fullmatch(r"(\d+)/(\d+)", latent):
            return cls(name=name, latent=found[2], layer=int(found[1]))
        return cls(name=name, latent=latent)


@dataclass(slots=True)
class Draft:
    """A catalog in the making: what it has already, if anything, and what is added to it.

    Attributes:
        notes: what the sources say of themselves.
        added: dictionaries that are new, and cost something at every token.
    """

    model: Fingerprint
    base: Catalog | None = None
    features: list[Feature] = field(default_factory=list)
    vectors: dict[str, FeatureVectors] = field(default_factory=dict)
    added: list[Dictionary] = field(default_factory=list)
    encoders: dict[str, Iterable[DictionaryVectors]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(
        self, stack: ExitStack, format: str, path: Path, picks: Sequence[Pick], options: Options
    ) -> None:
        """Add the picked features; sources stay open, for the writer, until the stack closes."""
        _check_names(picks, self.base)
        for layer in dict.fromkeys(pick.layer for pick in picks):
            here = [pick for pick in picks if pick.layer == layer]
            asked = options if layer is None else _at(options, layer)
            source = stack.enter_context(open_source(format, path, asked))
            if source.d_in != self.model.hidden_size:
                raise CatalogError(
                    f"{path}: is of width {source.d_in}, the model of {self.model.hidden_size}"
                )
            self._take(source, here, {"format": format, "from": path.absolute().name})
            self.notes += [note for note in source.notes if note not in self.notes]

    def write(self, folder: Path, name: str | None) -> Catalog:
        """Write the catalog, over the one it adds to if there is one."""
        if self.base is None:
            document = self._document(name or folder.absolute().name)
            return authoring.write_catalog(folder, document, self.vectors, self.encoders)
        old = self.base.document
        document = msgspec.structs.replace(
            old,
            name=name or old.name,
            features=old.features + tuple(self.features),
            dictionaries=old.dictionaries + tuple(self.added),
        )
        kept = {d.name: authoring.stored_encoder(self.base, d.name) for d in old.dictionaries}
        vectors = self.base.vectors | self.vectors
        encoders = kept | self.encoders
        return authoring.write_catalog(folder, document, vectors, encoders, overwrite=True)

    def _document(self, name: str) -> CatalogDocument:
        return CatalogDocument(
            schema=SCHEMA,
            name=name,
            version=FIRST_VERSION,
            model=self.model,
            features=tuple(self.features),
            dictionaries=tuple(self.added),
        )

    def _take(self, source: Source, picks: Sequence[Pick], told: dict[str, str]) -> None:
        indices = [source.index_of(pick.latent) for pick in picks]
        columns = source.columns(indices)
        topk = source.activation is Activation.TOPK
        dictionary = self._dictionary(source) if topk else None
        for i, (pick, index) in enumerate(zip(picks, indices, strict=True)):
            self.features.append(
                Feature(
                    name=pick.name,
                    kind=source.kind,
                    site=source.site,
                    layer=source.layer,
                    activation=source.activation,
                    dictionary=dictionary,
                    latent=index if topk else None,
                    label=pick.label,
                    label_source=pick.label_source,
                    source=told | source.provenance | {"latent": _latent(source, index)},
                )
            )
            self.vectors[pick.name] = _vectors(columns, i)

    def _dictionary(self, source: Source) -> str:
        """The name of the source's dictionary, which may be in the catalog already."""
        base = self.base.document.dictionaries if self.base else ()
        wanted = Dictionary(
            name=f"{source.site}_{source.layer}_topk",
            site=source.site,
            layer=source.layer,
            d_sae=source.d_sae,
            k=source.k or 0,
        )
        for old in base:
            same = msgspec.structs.replace(wanted, name=old.name) == old
            if same and self._is_stored(source, old.name):
                return old.name
        taken = {d.name for d in (*base, *self.added)}
        names = (f"{wanted.name}{f'_{n}' if n > 1 else ''}" for n in range(1, len(taken) + 2))
        name = next(name for name in names if name not in taken)
        self.added.append(msgspec.structs.replace(wanted, name=name))
        self.encoders[name] = source.whole_encoder()
        return name

    def _is_stored(self, source: Source, name: str) -> bool:
        if self.base is None:
            return False
        stored = authoring.stored_encoder(self.base, name)
        return authoring.same_encoder(stored, source.whole_encoder())


def _check_names(picks: Sequence[Pick], base: Catalog | None) -> None:
    if not picks:
        raise CatalogError("no feature was named; say --feature NAME=INDEX")
    taken = set(base.addresses) if base else set()
    for pick in picks:
        try:
            msgspec.convert(pick.name, Slug)
        except msgspec.ValidationError as error:
            raise CatalogError(f"feature {pick.name!r}: {error}") from None
        if pick.name in taken:
            raise CatalogError(f"feature {pick.name!r} is named twice, or in the catalog already")
        taken.add(pick.name)


def _at(options: Options, layer: int) -> Options:
    if options.layer not in (None, layer):
        raise CatalogError(f"layer {layer} of a feature contradicts --layer {options.layer}")
    return replace(options, layer=layer)


def _latent(source: Source, index: int) -> str:
    return source.names[index] if source.names else str(index)


def _vectors(columns: Columns, i: int) -> FeatureVectors:
    return FeatureVectors(
        W_enc=columns.W_enc[i],
        b_enc=float(columns.b_enc[i]),
        threshold=0.0 if columns.threshold is None else float(columns.threshold[i]),
        W_dec=None if columns.W_dec is None else columns.W_dec[i],
    )
