"""A checked, streamed copy of a Hugging Face Mixtral in another precision: needs megabytes, whatever the model's
size."""

from collections.abc import Collection
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from bimedix_jax.checkpoint import hub, table
from bimedix_jax.checkpoint.bnb_format import assemble
from bimedix_jax.checkpoint.hf_config import read_config, read_json, write_config
from bimedix_jax.checkpoint.safetensors_io import ShardedWriter, TensorSpec, pieces, read_folder
from bimedix_jax.files import new_folder

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def rewrite(
    folder: Path,
    output: str | Path,
    dtype: str,
    overwrite: bool = False,
    ignore_config_keys: Collection[str] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes the Mixtral in `folder` (hub or fused layout, packed by bitsandbytes or not) to `output` in hub layout and
    `dtype` (bfloat16 or float32).

    Raises BimedixError for whatever `load` would refuse; nothing is left behind.
    """
    config = read_config(folder, ignore_config_keys)
    hub.require_safetensors(folder)
    units = table.units(assemble(read_folder(folder), str(folder)), config, str(folder))
    entries = table.named_entries(config).items()
    specs = [TensorSpec(name, DTYPES[dtype], table.unit_shape(row, config)) for name, (row, _) in entries]
    with new_folder(output, overwrite) as partial:
        with (
            ShardedWriter(partial, specs, max_shard_bytes) as writer,
            tqdm(
                total=writer.total_bytes, unit="B", unit_scale=True, desc="converting", delay=2.0, disable=None
            ) as bar,
        ):
            for unit in units:
                name = table.named(unit.row.name, unit.index)
                for first, count in pieces(TensorSpec(name, unit.tensor.dtype, unit.shape)):
                    rows = unit.tensor.read(unit.first_row + first, count).astype(DTYPES[dtype], copy=False)
                    writer.write(name, rows, first)
                    bar.update(rows.nbytes)
        hub.copy_companions(folder, partial)
        write_config(partial, config, dtype, read_json(folder))
    return Path(output)
