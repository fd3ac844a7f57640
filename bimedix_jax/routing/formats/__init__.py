"""Recordings of routes in the formats of other programs; docs/formats.md describes each."""
