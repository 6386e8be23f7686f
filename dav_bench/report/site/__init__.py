"""A report as a website of plain files: it opens from disk, asks nothing of the network, and prints."""

from __future__ import annotations

from dav_bench.report.site.build import Built, build_site, is_current, stamp

__all__ = ["Built", "build_site", "is_current", "stamp"]
