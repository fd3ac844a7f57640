"""Upcycling: logits equal the dense model's; the router's gradient; the distance between experts."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from bimedix_jax.checkpoint.load import load
from bimedix_jax.checkpoint.safetensors_io import read_folder
from bimedix_jax.checkpoint.upcycle import REPORT_NAME, UpcycleRecipe, upcycle
from bimedix_jax.commands import upcycle as command
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.call import Output
from bimedix_jax.models.mixtral import Mixtral

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 13))
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def saved_llama(folder: Path, bias: float = 0.0, **changes: Any) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, **changes})
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.constant_(parameter, bias)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def logits_of(folder: Path) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama in several shards; read-only."""
    return saved_llama(tmp_path_factory.mktemp("llama") / "dense")


@pytest.fixture(scope="module")
def identical(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixtral:
    folder = tmp_path_factory.mktemp("mixture") / "m"
    upcycle(dense, folder, UpcycleRecipe(experts=4, top_k=2))
    return load(folder, base="float32")


@pytest.mark.parametrize(("experts", "top_k", "tied"), [(4, 2, False), (8, 1, True), (1, 1, False), (3, 3, True)])
def test_logits_equal_those_of_the_dense_model(tmp_path: Path, experts: int, top_k: int, tied: bool) -> None:
    source = saved_llama(tmp_path / "dense", tie_word_embeddings=tied)
    upcycle(source, tmp_path / "m", UpcycleRecipe(experts=experts, top_k=top_k))
    expected = logits_of(source)
    ours = logits(load(tmp_path / "m", base="float32"))
    for found in (ours, logits_of(tmp_path / "m")):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@nnx.jit
def run(model: Mixtral) -> Output:
    return model.hidden(TOKENS, record="choices")


def logits(model: Mixtral) -> np.ndarray:
    return np.asarray(model.head(run(model).hidden_BTD))


def loss(model: Mixtral) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(model.head(model.hidden(TOKENS[:, :-1]).hidden_BTD))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, jnp.asarray(TOKENS)[:, 1:, None], axis=-1))


def gradients(model: Mixtral) -> dict[str, float]:
    grads = nnx.jit(nnx.grad(loss))(model)
    return {".".join(map(str, path)): float(jnp.abs(leaf.get_value()).max()) for path, leaf in nnx.to_flat_state(grads)}


def test_identical_experts_give_the_router_no_gradient(dense: Path, identical: Mixtral, tmp_path: Path) -> None:
    same = gradients(identical)
    assert same["layers.moe.router.w"] < 1e-6 * same["layers.moe.w1.w"]
    upcycle(dense, tmp_path / "m", UpcycleRecipe(experts=4, top_k=2, drop_rate=0.5))
    apart = gradients(load(tmp_path / "m", base="float32"))
    assert apart["layers.moe.router.w"] > 1e-2 * apart["layers.moe.w1.w"]


def test_a_zero_router_chooses_the_first_experts(dense: Path, identical: Mixtral, tmp_path: Path) -> None:
    report = upcycle(dense, tmp_path / "m", UpcycleRecipe(experts=4, top_k=2, router_init="zero"))
    assert any("scores all experts equally" in warning for warning in report["warnings"])
    tied = run(load(tmp_path / "m", base="float32")).routing.experts_LBTK
    assert set(np.unique(tied)) == {0, 1}
    assert set(np.unique(run(identical).routing.experts_LBTK)) == {0, 1, 2, 3}


def expert(folder: Path, layer: int, index: int) -> dict[str, np.ndarray]:
    tensors = read_folder(folder)
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{index}."
    return {name: tensors[f"{prefix}{name}.weight"].read() for name in ("w1", "w2", "w3")}


def test_drop_upcycling_redraws_the_same_share_everywhere(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "m", UpcycleRecipe(experts=4, top_k=2, drop_rate=0.3))
    source = read_folder(dense)
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    chosen = set()
    for index in range(4):
        found = expert(tmp_path / "m", 1, index)
        moved = {}
        for name, theirs in names.items():
            same = found[name] == source[f"model.layers.1.mlp.{theirs}.weight"].read()
            moved[name] = ~(same.all(axis=0) if name == "w2" else same.all(axis=1))
        assert moved["w1"].sum() == round(0.3 * 40)
        assert np.array_equal(moved["w1"], moved["w3"])
        assert np.array_equal(moved["w1"], moved["w2"])
        chosen.add(moved["w1"].tobytes())
    assert len(chosen) == 4


def test_redrawn_weights_have_the_statistics_of_the_replaced_ones(tmp_path: Path) -> None:
    source = saved_llama(tmp_path / "dense", intermediate_size=400, num_hidden_layers=1)
    upcycle(source, tmp_path / "m", UpcycleRecipe(experts=2, top_k=1, drop_rate=1.0))
    original = read_folder(source)["model.layers.0.mlp.up_proj.weight"].read()
    drawn = expert(tmp_path / "m", 0, 1)["w3"]
    assert abs(drawn.std() / original.std() - 1) < 0.03
    assert abs(drawn.mean() - original.mean()) < 0.02 * original.std()


@pytest.mark.parametrize("perturbation", [{"drop_rate": 0.5}, {"noise": 0.1}, {"drop_rate": 0.2, "noise": 0.05}])
def test_the_reported_distance_equals_its_definition(dense: Path, tmp_path: Path, perturbation: dict[str, Any]) -> None:
    report = upcycle(dense, tmp_path / "m", UpcycleRecipe(experts=3, top_k=2, **perturbation))
    original = np.concatenate(
        [read_folder(dense)[f"model.layers.0.mlp.{n}_proj.weight"].read().ravel() for n in ("gate", "up", "down")]
    )
    flat = [np.concatenate([w.ravel() for w in expert(tmp_path / "m", 0, e).values()]) for e in range(3)]
    pairs = [np.linalg.norm(flat[i] - flat[j]) / np.linalg.norm(original) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert report["expert_distance_by_layer"][0] == pytest.approx(np.mean(pairs), rel=1e-4)
    assert report["warnings"] == []
    assert json.loads((tmp_path / "m" / REPORT_NAME).read_text()) == report


def test_identical_experts_are_reported_as_such(dense: Path, tmp_path: Path) -> None:
    report = upcycle(dense, tmp_path / "m", UpcycleRecipe(experts=3, top_k=2))
    assert report["experts_identical"]
    assert report["expert_distance"] == 0
    assert any("identical" in warning for warning in report["warnings"])


def test_results_depend_on_the_seed_and_not_on_piece_sizes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(name: str, seed: int) -> dict[str, bytes]:
        upcycle(dense, tmp_path / name, UpcycleRecipe(experts=2, top_k=1, drop_rate=0.4, noise=0.1, seed=seed))
        return {key: tensor.read().tobytes() for key, tensor in read_folder(tmp_path / name).items()}

    first = written("a", 0)
    from bimedix_jax.checkpoint import upcycle as module

    monkeypatch.setattr(module, "pieces", lambda spec: ((row, 1) for row in range(spec.shape[0])))
    assert written("b", 0) == first
    other = written("c", 1)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert other[router] != first[router]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scales its rotary"),
    ],
)
def test_unsupported_dense_models_raise(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    source = saved_llama(tmp_path / "dense", bias=0.1, **changes)
    with pytest.raises(BimedixError, match=why):
        upcycle(source, tmp_path / "m", UpcycleRecipe(experts=4, top_k=2))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_biases_of_zeros_change_nothing(tmp_path: Path) -> None:
    source = saved_llama(tmp_path / "dense", attention_bias=True, mlp_bias=True)
    upcycle(source, tmp_path / "m", UpcycleRecipe(experts=2, top_k=1))
    written, own = read_folder(tmp_path / "m"), read_folder(source)
    assert not any(name.endswith(".bias") for name in written)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert written[name].read().tobytes() == own[name].read().astype(written[name].dtype).tobytes()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"experts": 2, "top_k": 3}, "top-k"),
        ({"experts": 2, "top_k": 0}, "top-k"),
        ({"experts": 2, "top_k": 1, "drop_rate": 1.5}, "drop-rate"),
        ({"experts": 2, "top_k": 1, "noise": -1.0}, "noise"),
        ({"experts": 2, "top_k": 1, "router_std": 0.0}, "router-init"),
    ],
)
def test_invalid_recipes_raise(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(BimedixError, match=why):
        UpcycleRecipe(**arguments)


def test_the_command(dense: Path, tmp_path: Path) -> None:
    config = command.Config(out=tmp_path / "m", model=str(dense), experts=2, drop_rate=0.5)
    result = command.run(config, Console(stderr=True))
    assert result["output"] == str(tmp_path / "m")
    assert result["expert_distance"] > 1
    with pytest.raises(BimedixError, match="not empty"):
        command.run(config, Console(stderr=True))
