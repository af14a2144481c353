"""Compact entries into key/value caches, against one copy of the same bytes."""
