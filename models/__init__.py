"""Mixtral in Flax NNX. Modules name logical axes; they never see meshes, files or data."""
