"""The catalog's document model: what ``catalog.yaml`` may say.

Structs are decoded strictly: an unknown key, a wrong type or a missing field is
an error that names its path. Vectors live beside it in ``features.safetensors``
(see ``catalog.store``).
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec

from steerscope.steering.interventions import Intervention, PolicyName

SCHEMA = "steerscope.catalog/v1"

Slug = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
LabelSlug = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,30}$")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
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
    """The encoder's nonlinearity."""

    RELU = "relu"
    JUMPRELU = "jumprelu"
    IDENTITY = "identity"


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


NUM_FIRST_GENERATED = 8
"""How many generated tokens the ``*_first_generated`` reductions look at."""


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
    label: str = ""
    description: str = ""
    source: dict[str, str] = {}
    evidence: dict[str, Any] = {}

    @property
    def writes(self) -> Site:
        """Where an edit lands: a transcoder reads ``mlp_in`` and writes ``mlp_out``."""
        if self.kind is FeatureKind.TRANSCODER_LATENT and self.site is Site.MLP_IN:
            return Site.MLP_OUT
        return self.site


class Term(_Document, frozen=True):
    """One summand of a signal: ``weight`` times a reduced activation."""

    feature: Slug
    reduce: Reduction
    weight: float


class Label(_Document, frozen=True):
    """A named band of a signal's score: everything ``below`` the bound (the last has none)."""

    label: LabelSlug
    below: float | None = None


class Signal(_Document, frozen=True):
    """A calibrated probability: ``sigmoid(bias + sum of terms)``, computed in the hub."""

    name: Slug
    terms: tuple[Term, ...]
    bias: float
    labels: tuple[Label, ...]
    description: str = ""
    evidence: dict[str, Any] = {}


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
    signals: tuple[Signal, ...] = ()
    policies: tuple[CatalogPolicy, ...] = ()
    description: str = ""
