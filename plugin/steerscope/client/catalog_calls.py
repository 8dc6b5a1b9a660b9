"""The calls of ``CatalogService``."""

from __future__ import annotations

from steerscope.api.v1 import catalog_pb2
from steerscope.client.call import PAGE_SIZE, Call, Listing
from steerscope.hub.conversions import FEATURES


def get_catalog(*, timeout: float | None = None) -> Call[catalog_pb2.Catalog]:
    """The catalog in force with its signals, without its features."""
    return Call(
        rpc="GetCatalog",
        request=catalog_pb2.GetCatalogRequest(),
        read=lambda answer: answer.catalog,
        is_repeatable=True,
        timeout=timeout,
    )


def get_feature(name: str, *, timeout: float | None = None) -> Call[catalog_pb2.Feature]:
    """One feature by its plain name."""
    return Call(
        rpc="GetFeature",
        request=catalog_pb2.GetFeatureRequest(name=FEATURES + name),
        read=lambda answer: answer.feature,
        is_repeatable=True,
        timeout=timeout,
    )


def list_features(
    filter: str = "", *, timeout: float | None = None
) -> Listing[catalog_pb2.Feature]:
    """The features of the catalog in force for which ``filter`` holds; it is AIP-160."""
    return Listing(
        rpc="ListFeatures",
        request=catalog_pb2.ListFeaturesRequest(page_size=PAGE_SIZE, filter=filter),
        items=lambda page: page.features,
        timeout=timeout,
    )
