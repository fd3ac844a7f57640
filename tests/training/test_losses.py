"""The loss equals a NumPy loop, for any chunks and any packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.models.init import init_random
from bimedix_jax.training.losses import next_token_loss, targets_of, token_losses


def identity(hidden):
    """A head that returns the hidden states as logits."""
    return hidden.astype(jnp.float32)


def numpy_loss(logits, batch):
    """(sum, count), token by token, in float64."""
    total, count = 0.0, 0
    tokens, segments, mask = batch["tokens_BT"], batch["segment_ids_BT"], batch["loss_mask_BT"]
    for row in range(tokens.shape[0]):
        for place in range(tokens.shape[1] - 1):
            same = segments[row, place] == segments[row, place + 1] != 0
            if same and mask[row, place + 1]:
                x = logits[row, place].astype(np.float64)
                total += np.log(np.exp(x - x.max()).sum()) + x.max() - x[tokens[row, place + 1]]
                count += 1
    return total, count


@pytest.mark.parametrize("chunk_tokens", [1, 7, 12, 1000])
def test_masked_loss_equals_numpy(batch, chunk_tokens):
    """Also with chunks that do not divide the sequence, and with an empty row."""
    data = batch(3, 11, seed=3)
    data["segment_ids_BT"][1] = 0
    logits = np.random.default_rng(0).normal(0, 3, (3, 11, 304)).astype(np.float32)
    total, count = numpy_loss(logits, data)
    assert count > 5
    got = next_token_loss(identity, jnp.asarray(logits), *map(jnp.asarray, data.values()), chunk_tokens=chunk_tokens)
    np.testing.assert_allclose(np.array(got), [total, count], rtol=1e-6)


def test_chunking_does_not_change_gradients(batch):
    data = {name: jnp.asarray(x) for name, x in batch(2, 12).items()}
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (2, 12, 304)), jnp.float32)

    def gradient(chunk_tokens):
        return jax.grad(lambda h: next_token_loss(identity, h, *data.values(), chunk_tokens=chunk_tokens)[0])(logits)

    np.testing.assert_allclose(gradient(6), gradient(1000), atol=1e-6)
    _, learned = targets_of(*data.values())
    assert not np.any(np.array(gradient(6))[~np.array(learned)]), "a position without a target has a gradient"


def test_no_target_crosses_a_segment_or_follows_padding():
    tokens = jnp.arange(8)[None]
    segments = jnp.asarray([[0, 1, 1, 1, 2, 2, 0, 0]])
    _, learned = targets_of(tokens, segments, jnp.ones((1, 8), bool))
    assert learned.tolist() == [[False, True, True, False, True, False, False, False]]


def test_logits_of_the_whole_batch_are_never_allocated():
    """The compiled gradient needs less working space than half of one float32 [B, T, V] array."""

    table = jnp.ones((64, 4096), jnp.float32) / 64

    def loss(hidden):
        return jnp.sum(token_losses(lambda h: h @ table, hidden, jnp.zeros((2, 512), jnp.int32), chunk_tokens=64))

    memory = jax.jit(jax.grad(loss)).lower(jnp.ones((2, 512, 64))).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * 512 * 4096 * 4 / 2


def test_packed_loss_equals_unpacked_loss(config):
    """Three conversations in one row, or in three rows."""
    model = init_random(config, seed=1, std=0.3)
    random = np.random.default_rng(5)
    lengths = [5, 7, 4]
    pieces = [random.integers(0, config.vocab_size, n, dtype=np.int32) for n in lengths]
    masks = [np.arange(n) >= 2 for n in lengths]

    def rows(groups):
        made = {
            name: np.zeros((len(groups), 18), kind) for name, kind in (("t", np.int32), ("s", np.int32), ("m", bool))
        }
        for row, group in enumerate(groups):
            place = 0
            for number, piece in enumerate(group, start=1):
                span = slice(place, place := place + lengths[piece])
                made["t"][row, span], made["s"][row, span], made["m"][row, span] = pieces[piece], number, masks[piece]
        return made

    @jax.jit
    def loss(made):
        return jnp.stack(
            next_token_loss(model.head, model.hidden(made["t"], made["s"]).hidden_BTD, made["t"], made["s"], made["m"])
        )

    np.testing.assert_allclose(loss(rows([[0, 1, 2]])), loss(rows([[0], [1], [2]])), rtol=1e-5)
