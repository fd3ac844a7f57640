"""Mixtral in Flax NNX. Modules name logical axes, never meshes, files or data."""
