"""A checked copy of a Hugging Face Mixtral in another precision, streamed through a few megabytes of memory."""

from collections.abc import Collection, Iterator
from pathlib import Path

from bimedix_jax.checkpoint import hub, table
from bimedix_jax.checkpoint.dtypes import COMPUTE
from bimedix_jax.checkpoint.hf import check_packed
from bimedix_jax.checkpoint.hf_config import raw_config, read_config, write_config
from bimedix_jax.checkpoint.hf_tensors import read_tensors
from bimedix_jax.checkpoint.rounding import Rounding, read_pieces
from bimedix_jax.checkpoint.safetensors_io import TensorSpec
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

    Raises BimedixError for everything that `load` refuses, such as weights that are not finite; nothing is left behind.
    Warns with the number of values that rounding changed.
    """
    config = read_config(folder, ignore_config_keys)
    hub.require_safetensors(folder)
    hub.check_companions(folder)
    units = table.units(read_tensors(folder, config), config, str(folder))
    check_packed(units, folder, ignore_config_keys)
    entries = table.named_entries(config).items()
    specs = [TensorSpec(name, COMPUTE[dtype], table.unit_shape(row, config)) for name, (row, _) in entries]

    rounding = Rounding()

    def converted() -> Iterator[Piece]:
        for unit in units:
            name = table.named(unit.row.name, unit.index)
            for first, rows in read_pieces(unit.tensor, unit.first_row, unit.shape):
                yield name, first, rounding.cast(rows, COMPUTE[dtype], unit.tensor.name)

    def finish(partial: Path) -> None:
        hub.copy_companions(folder, partial)
        write_config(partial, config, dtype, raw_config(folder))

    written = stream_to(output, specs, converted(), "converting", finish, overwrite, max_shard_bytes)
    rounding.warn(str(folder), "base float32 keeps them")
    return written
