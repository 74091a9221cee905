"""The feature cache: encoded features in a Zarr v3 group. A shard of it counts only when its commit record is written."""

from pipeline.cache.reader import Cache, find_caches, info, open_cache
from pipeline.cache.verify import verify
from pipeline.cache.writer import Writer

__all__ = ["Cache", "Writer", "find_caches", "info", "open_cache", "verify"]
