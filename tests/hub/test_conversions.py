import msgspec
import pytest
from steerscope.api.v1 import catalog_pb2
from steerscope.catalog.model import (
    Activation,
    Calibration,
    FeatureKind,
    Isotonic,
    Label,
    LabelSource,
    Signal,
    Site,
    Target,
)
from steerscope.hub.conversions import feature_message, signal_message


@pytest.mark.parametrize(
    ("field", "members", "enum"),
    [
        ("kind", FeatureKind, catalog_pb2.FeatureKind),
        ("site", Site, catalog_pb2.Site),
        ("activation", Activation, catalog_pb2.Activation),
        ("label_source", LabelSource, catalog_pb2.LabelSource),
    ],
)
def test_whatever_a_catalog_can_say_of_a_feature_the_api_can_say(catalog, field, members, enum):
    feature = catalog.feature("known")
    for member in members:
        message = feature_message(catalog, msgspec.structs.replace(feature, **{field: member}))
        assert enum.Name(getattr(message, field)).endswith(f"_{member.name}")


def test_an_isotonic_map_is_told_knot_by_knot():
    map_ = Isotonic(z=(-1.0, 0.5), p=(0.1, 0.9))
    signal = Signal(
        name="s",
        terms=(),
        bias=0.0,
        labels=(Label(label="any"),),
        predicts=Target(label="answered"),
        calibration=Calibration(map=map_, num_cases=3, split="dev"),
    )
    message = signal_message(signal)
    assert message.calibration.WhichOneof("map") == "isotonic"
    assert list(message.calibration.isotonic.z) == [-1.0, 0.5]
    assert list(message.calibration.isotonic.p) == [0.1, 0.9]
    assert not message.predicts.HasField("among")
