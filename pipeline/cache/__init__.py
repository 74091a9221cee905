"""The feature cache: a Zarr v3 group whose shards are real only once a commit record says so."""

from pipeline.cache.reader import Cache, find_caches, info, open_cache
from pipeline.cache.verify import verify
from pipeline.cache.writer import Writer

__all__ = ["Cache", "Writer", "find_caches", "info", "open_cache", "verify"]
