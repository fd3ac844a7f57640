"""Mixtral in Flax NNX. Modules name logical axes, never meshes, files or data."""

if __name__ == "models":
    raise ImportError("the name of this package is bimedix_jax.models; a second copy would not share its classes")
