"""Archive -> content-addressed layers -> what to stack; no mount, no container."""

from pytest_nsbox.rootfs.cache import Entry, LayerCache
from pytest_nsbox.rootfs.importer import resolve
from pytest_nsbox.rootfs.source import Kind, check, kind_of

__all__ = ["Entry", "Kind", "LayerCache", "check", "kind_of", "resolve"]
