"""What Prometheus scrapes: `Collector`, for an exporter of one's own; and all that `kvmstats export` does besides."""

from __future__ import annotations

from kvmstats_fast.formats import need

need("prometheus_client", "prometheus")

from kvmstats_fast.export.collector import Collector  # noqa: E402 - where the extra is missing, the line above says so

__all__ = ["Collector"]
