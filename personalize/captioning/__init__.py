"""Captions written by a model: captioners are rows of `registry.table("captioners")`, one file each."""
