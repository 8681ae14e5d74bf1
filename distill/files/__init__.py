"""Atomic file writing, digests and checksums."""
