"""The catalog's document model: what ``catalog.yaml`` may say.

Structs are decoded strictly: an unknown key, a wrong type or a missing field is
an error that names its path. Vectors live beside it in ``features.safetensors``
(see ``catalog.store``).
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal

import msgspec

from steerscope.steering.interventions import Intervention, PolicyName

SCHEMA = "steerscope.catalog/v1"

Slug = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,62}\Z")]
LabelSlug = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,30}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=1)]
LayerIndex = Annotated[int, msgspec.Meta(ge=0)]


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common decoding rules: immutable, strict, by keyword."""


class FeatureKind(enum.StrEnum):
    """What a feature is, so that nobody mistakes a probe for an SAE latent."""

    SAE_LATENT = "sae_latent"
    TRANSCODER_LATENT = "transcoder_latent"
    DIRECTION = "direction"
    PROBE = "probe"


class Site(enum.StrEnum):
    """A place in a decoder layer (TransformerLens names), in the order a token passes them.

    ``resid_*`` are the stream itself: as it enters the layer, after attention was added, as it
    leaves. ``attn_out`` and ``mlp_out`` are what attention and the MLP add to it, after any
    norm on their output. ``mlp_in`` is what the MLP reads, after its norm.
    """

    RESID_PRE = "resid_pre"
    ATTN_OUT = "attn_out"
    RESID_MID = "resid_mid"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"
    RESID_POST = "resid_post"

    @property
    def order(self) -> int:
        """Place in the order of the forward pass."""
        return list(Site).index(self)


class Activation(enum.StrEnum):
    """The encoder's nonlinearity. ``topk`` needs the whole dictionary, see ``Dictionary``."""

    RELU = "relu"
    JUMPRELU = "jumprelu"
    IDENTITY = "identity"
    TOPK = "topk"


class LabelSource(enum.StrEnum):
    """Who says what a feature means."""

    HUMAN = "human"
    AUTOMATIC = "automatic"


class Reduction(enum.StrEnum):
    """How one feature's activations over a request become one number."""

    LAST_PROMPT_TOKEN = "last_prompt_token"
    MAX_PROMPT = "max_prompt"
    MEAN_PROMPT = "mean_prompt"
    MAX_GENERATION = "max_generation"
    MIN_GENERATION = "min_generation"
    MEAN_GENERATION = "mean_generation"
    MAX_FIRST_GENERATED = "max_first_generated"
    MIN_FIRST_GENERATED = "min_first_generated"
    MEAN_FIRST_GENERATED = "mean_first_generated"
    LAST_ENTITY_TOKEN = "last_entity_token"
    MAX_ENTITY_SPAN = "max_entity_span"
    MEAN_ENTITY_SPAN = "mean_entity_span"


MAX_FIRST_GENERATED = 64
"""How many generated tokens a ``*_first_generated`` reduction may look at."""


class ModelMatch(enum.StrEnum):
    """How a served model compares with the one a catalog was made for."""

    EXACT = "exact"
    FINE_TUNE = "fine_tune"
    """The same geometry, other weights or another tokenizer; only where that is allowed."""
    UNVERIFIED = "unverified"
    """The same geometry; the files are not on local disk, so nothing else was compared."""


class Fingerprint(_Document, frozen=True):
    """The model a catalog was made for; every field given must match."""

    architecture: str
    hidden_size: Count
    num_hidden_layers: Count
    vocab_size: Count
    tokenizer_sha256: Digest | None = None
    weights: dict[str, Digest] = {}


class Feature(_Document, frozen=True):
    """One feature: a column of an encoder and, if it can steer, a row of a decoder."""

    name: Slug
    kind: FeatureKind
    site: Site
    layer: LayerIndex
    activation: Activation
    dictionary: Slug | None = None
    latent: LayerIndex | None = None
    """topk only: the dictionary it competes in, and its place there."""
    label: str = ""
    label_source: LabelSource = LabelSource.HUMAN
    description: str = ""
    source: dict[str, str] = {}
    evidence: dict[str, Any] = {}

    @property
    def writes(self) -> Site:
        """Where an edit lands: a transcoder reads ``mlp_in`` and writes ``mlp_out``."""
        if self.kind is FeatureKind.TRANSCODER_LATENT and self.site is Site.MLP_IN:
            return Site.MLP_OUT
        return self.site


class Dictionary(_Document, frozen=True):
    """A whole TopK dictionary: ``k`` of its ``d_sae`` latents are active at a token.

    Which ones is only known when all of them are computed, so its encoder travels with the
    catalog and is evaluated in the graph: ``d_sae * D`` multiplications a token.
    """

    name: Slug
    site: Site
    layer: LayerIndex
    d_sae: Count
    k: Count


class Span(_Document, frozen=True):
    """The prompt tokens at which a feature of the same site is above a bound: an entity, say."""

    feature: Slug
    above: float


class Term(_Document, frozen=True):
    """One summand of a signal: ``weight`` times a reduced activation."""

    feature: Slug
    reduce: Reduction
    weight: float
    first: Annotated[int, msgspec.Meta(ge=1, le=MAX_FIRST_GENERATED)] = 8
    """How many generated tokens a ``*_first_generated`` reduction looks at."""
    span: Span | None = None
    """Which tokens an ``*_entity_*`` reduction looks at."""


class Label(_Document, frozen=True):
    """A named band of a signal's score: everything ``below`` the bound (the last has none)."""

    label: LabelSlug
    below: float | None = None


class Platt(_Document, frozen=True, tag_field="method", tag="platt"):
    """``p = sigmoid(scale * z + offset)`` (Platt 1999)."""

    scale: float
    offset: float


class Isotonic(_Document, frozen=True, tag_field="method", tag="isotonic"):
    """``p`` by linear interpolation between knots, constant beyond the outer ones."""

    z: tuple[float, ...]
    p: tuple[float, ...]


class Threshold(_Document, frozen=True):
    """At most ``max_fpr`` of negatives score above ``score``: split conformal, marginally."""

    score: float
    max_fpr: float
    num_negatives: Count
    """Independent negative cases (one of each name) that the bound was chosen on."""


class Calibration(_Document, frozen=True):
    """How the weighted sum ``z`` becomes a probability, and what was learned where."""

    map: Platt | Isotonic
    num_cases: Count
    split: str
    """Which cases, with the digest of their split."""
    thresholds: tuple[Threshold, ...] = ()


class Target(_Document, frozen=True):
    """What a signal is meant to predict: a label of a case, among those with another label.

    The lab gives each answered case ``answered`` or ``declined``, and ``correct`` or ``wrong``
    where it was answered; a case file may declare further ones, ``known`` say.
    """

    label: LabelSlug
    among: LabelSlug | None = None


class Signal(_Document, frozen=True):
    """A calibrated probability: ``map(bias + sum of terms)``, computed in the hub.

    Without a calibration the map is the logistic function.
    """

    name: Slug
    terms: tuple[Term, ...]
    bias: float
    labels: tuple[Label, ...]
    description: str = ""
    predicts: Target | None = None
    calibration: Calibration | None = None
    evidence: dict[str, Any] = {}


class Baseline(_Document, frozen=True):
    """How often a feature's activations fell into each bin when the catalog was calibrated.

    Bin ``i`` holds ``edges[i-1] <= f < edges[i]``; the outer ones are open, so there is one
    more share than edges.
    """

    feature: Slug
    phase: Literal["prompt", "generation"]
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    num_tokens: Count


class CatalogPolicy(_Document, frozen=True):
    """A steering policy that ships with the catalog."""

    name: PolicyName
    interventions: tuple[Intervention, ...]
    max_dose: float | None = None
    description: str = ""


class CatalogDocument(_Document, frozen=True):
    """The whole of ``catalog.yaml``."""

    schema: str
    name: str
    version: str
    model: Fingerprint
    features: tuple[Feature, ...]
    dictionaries: tuple[Dictionary, ...] = ()
    signals: tuple[Signal, ...] = ()
    policies: tuple[CatalogPolicy, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    description: str = ""
