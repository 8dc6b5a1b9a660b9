"""The page of all metrics, docs/metrics.md, made from the exporter's own declarations."""
