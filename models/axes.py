"""Dimension letters and logical axis names: the legend of every array name in this project.

An array's name ends in its dimensions: `x_BTD` is [batch, query tokens, model width].

| letter | logical axis | meaning |
|---|---|---|
| B | batch | sequences (rows) of a batch |
| T | length | query tokens |
| S | length | key and value tokens |
| N | tokens | B * T tokens as one axis |
| M | rows | token-expert pairs, N * K in number, sorted by expert |
| L | layers | transformer blocks, the scanned axis |
| D | embed | model width (a matmul's input) |
| F | mlp | feed-forward width (a matmul's output) |
| V | vocab | vocabulary |
| E | experts | experts of a layer; in kernels/, the experts that an operation is given |
| e | experts | the experts of one shard: E divided by the expert parallelism |
| K | | experts chosen for a token |
| Q | heads | query heads |
| G | kv_heads | key and value heads |
| H | head | width of a head |
| R | rank | rank of an adapter |

Parameters have their logical axes as metadata (`axes=` of the variable). bimedix_jax/sharding/rules.py maps them to a
mesh.
"""

BATCH = "batch"
LENGTH = "length"
LAYERS = "layers"
EXPERTS = "experts"
EMBED = "embed"
MLP = "mlp"
HEADS = "heads"
KV_HEADS = "kv_heads"
VOCAB = "vocab"
RANK = "rank"
"""Logical axis names: of parameters, and batch and length of activations."""
