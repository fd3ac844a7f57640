"""A checked copy of a Hugging Face Mixtral in another precision, streamed through a few megabytes of memory."""

from collections.abc import Collection, Iterator
from pathlib import Path

from bimedix_jax.checkpoint import hub, table
from bimedix_jax.checkpoint.dtypes import COMPUTE
from bimedix_jax.checkpoint.hf_config import raw_config, read_config, write_config
from bimedix_jax.checkpoint.hf_tensors import read_tensors
from bimedix_jax.checkpoint.safetensors_io import TensorSpec, pieces
from bimedix_jax.checkpoint.stream import MAX_SHARD_BYTES, Piece, stream_to


def rewrite(
    folder: Path,
    output: str | Path,
    dtype: str,
    overwrite: bool = False,
    ignore_config_keys: Collection[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes the Mixtral in `folder` (hub or fused layout, packed by bitsandbytes or not) to `output` in hub layout and
    `dtype` (bfloat16 or float32).

    Raises BimedixError for everything that `load` refuses; nothing is left behind.
    """
    config = read_config(folder, ignore_config_keys)
    hub.require_safetensors(folder)
    hub.check_companions(folder)
    units = table.units(read_tensors(folder, config), config, str(folder))
    entries = table.named_entries(config).items()
    specs = [TensorSpec(name, COMPUTE[dtype], table.unit_shape(row, config)) for name, (row, _) in entries]

    def converted() -> Iterator[Piece]:
        for unit in units:
            name = table.named(unit.row.name, unit.index)
            for first, count in pieces(TensorSpec(name, unit.tensor.dtype, unit.shape)):
                yield name, first, unit.tensor.read(unit.first_row + first, count).astype(COMPUTE[dtype], copy=False)

    def finish(partial: Path) -> None:
        hub.copy_companions(folder, partial)
        write_config(partial, config, dtype, raw_config(folder))

    return stream_to(output, specs, converted(), "converting", finish, overwrite, max_shard_bytes)
