"""The planner's time of 512 tokens beside llm-analysis, which the paper used for its Table 6.

`LlmAnalysis` states the formulas of llm-analysis 0.2.2 (Cheng Li, November 2023, the version of the paper's time) for
inference at batch 1 again, in our words; REPORTED has what the package itself printed.
"""

import dataclasses

import pytest

from bimedix_jax.costs.devices import DEVICES
from bimedix_jax.evals.paper import published
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.plan.latency import active_packed, architecture, cache_bytes, generation, packed_weights, parameters

A100 = DEVICES["a100-80gb"]
IDEAL = dataclasses.replace(A100, launch_seconds=0.0)


@dataclasses.dataclass(frozen=True)
class LlmAnalysis:
    """A model there: a dense decoder whose feed-forward layer has two matrices of width `hidden`."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int

    def latency(self, bits: int, count: int, share: float, prompt: int, tokens: int) -> tuple[float, float, float]:
        """Seconds of (the prompt, a token, all); `share` of the memory bandwidth, and of no peak FLOPs."""
        cache = 2 * 2 * self.layers * self.width * self.kv_heads / self.heads * (prompt + tokens)
        step = self.forward(1, bits, count, share) + 2 * cache / count / (share * 2039e9)
        first = self.forward(prompt, bits, count, share)
        return first, step, first + tokens * step

    def forward(self, new: int, bits: int, count: int, share: float) -> float:
        width, peak, bandwidth = self.width, 312e12 * count, share * 2039e9
        grouped = 1 + self.kv_heads / self.heads
        attention = self.slower(
            4 * new * width * (width * grouped + new) / peak,
            2 * width**2 * grouped * bits / 8 / count,
            max(6 * new * width, 4 * new * (width + 2 * self.heads)) / count,
            bandwidth,
        )
        feed_forward = self.slower(
            16 * new * width**2 / peak,
            2 * width * self.hidden * bits / 8 / count,
            2 * new * self.hidden / count,
            bandwidth,
        )
        norm = 4 * new * width / count / bandwidth  # the package ignores the data type that it is given
        reduce = self.reduction(new, count)
        layer = attention + feed_forward + 2 * norm + 2 * reduce
        embedding = 2 * self.vocabulary * width / bandwidth + reduce
        return self.layers * layer + embedding + 2 * new * self.vocabulary * width / peak

    @staticmethod
    def slower(computing: float, weights: float, activations: float, bandwidth: float) -> float:
        return max(computing, (weights + activations) / bandwidth)

    def reduction(self, new: int, count: int) -> float:
        sent = 2 * new * self.width * (count - 1) / count * 2
        return max(sent / 300e9, 8e-6) if count > 1 else 0.0


THEIRS = {
    "llama-13b": LlmAnalysis(40, 5120, 4 * 5120, 40, 40, 32_000),
    "llama-2-70b": LlmAnalysis(80, 8192, 4 * 8192, 64, 8, 32_000),
    "jais-30b": LlmAnalysis(48, 7168, 4 * 7168, 56, 56, 84_992),
    "mixtral-8x7b": LlmAnalysis(32, 4096, 2 * 14_336, 32, 8, 32_000),
}
"""Its own files give LLaMA a width of four times the model's; Mixtral is the dense model of its two chosen experts."""
REPORTED = {
    ("llama-13b", 16, 2, 0.9): (0.02308459493795098, 0.00814223424487452, 4.191908528313705),
    ("llama-13b", 8, 1, 0.8): (0.043238932501633534, 0.008947114013153758, 4.624161307236358),
    ("llama-2-70b", 16, 2, 0.9): (0.09735487743138307, 0.031748384513340284, 16.352527748261608),
    ("llama-2-70b", 8, 1, 0.8): (0.18563884278506357, 0.03447879115081551, 17.838779912002604),
    ("jais-30b", 16, 2, 0.9): (0.053565311802237774, 0.01833913468892219, 9.4432022725304),
    ("jais-30b", 8, 1, 0.8): (0.10189909389256009, 0.020626511962989598, 10.662673218943235),
    ("mixtral-8x7b", 16, 2, 0.9): (0.0108839402653972, 0.005564595779093992, 2.859956979161521),
    ("mixtral-8x7b", 8, 1, 0.8): (0.019861924659266963, 0.005758944373838359, 2.968441444064507),
}
"""(model, bits of a weight, GPUs, share of the bandwidth) -> seconds of prompt, token and all, from the package."""
NEEDED = {"llama-13b": 0.916, "llama-2-70b": 0.592, "jais-30b": 0.596, "mixtral-8x7b": 0.908}
"""Share of the bandwidth with which 16 bits on two GPUs give the paper's figures."""


def ours(name):
    return architecture(**dataclasses.asdict(published().efficiency.architectures[name]))


@pytest.mark.parametrize("case", REPORTED, ids=str)
def test_the_restated_formulas_are_those_of_the_package(case):
    name, bits, count, share = case
    assert THEIRS[name].latency(bits, count, share, 512, 512) == pytest.approx(REPORTED[case], rel=1e-9)


ONE_EXPERT = dataclasses.replace(THEIRS["mixtral-8x7b"], hidden=4 * 4096)
"""Mixtral as a dense model with one feed-forward layer of the package's usual width."""


def test_what_the_printed_figures_need():
    """The footnote of Table 6: 0.59 of the bandwidth, or 0.91 for PMC-LLaMA and for BiMediX with two experts."""
    for row in published().efficiency.rows:
        _, _, seconds = THEIRS[row.architecture].latency(16, 2, NEEDED[row.architecture], 512, 512)
        assert seconds == pytest.approx(row.latency, abs=0.05)
        assert 512 / seconds == pytest.approx(row.tokens_per_s, rel=2e-3)
    printed = next(row for row in published().efficiency.rows if row.model == "BiMediX")
    assert 512 / ONE_EXPERT.latency(16, 2, 0.593, 512, 512)[2] == pytest.approx(printed.tokens_per_s, rel=2e-3)
    _, _, slow = THEIRS["llama-2-70b"].latency(16, 2, 0.593, 512, 512)
    _, _, fast = THEIRS["mixtral-8x7b"].latency(16, 2, 0.593, 512, 512)
    assert slow / fast == pytest.approx(5.8, abs=0.05)
    _, _, slow = THEIRS["llama-2-70b"].latency(16, 2, 0.9, 512, 512)
    _, _, fast = THEIRS["mixtral-8x7b"].latency(16, 2, 0.9, 512, 512)
    assert slow / fast == pytest.approx(5.7, abs=0.05)


@pytest.mark.parametrize("name", THEIRS)
def test_the_planner_differs_from_llm_analysis_by_what_is_known(name):
    """With its efficiencies, its bytes and no time between kernels, a token takes the same time to 1 %.

    Our weights are the real ones, three matrices and the head included; it has two, reads the table of embeddings in
    each step and no head, and counts the cache twice at its final length.
    """
    config, theirs = ours(name), THEIRS[name]
    table = 2 * theirs.vocabulary * theirs.width
    grouped = 1 + theirs.kv_heads / theirs.heads
    counted = 2 * theirs.layers * 2 * theirs.width * (theirs.width * grouped + theirs.hidden)
    more = 2 * parameters(config)[1] - counted + cache_bytes(config, 768) - 2 * cache_bytes(config, 1024)
    _, step, _ = theirs.latency(16, 2, 0.8, 512, 512)
    expected = step + (more / 2 - table) / (0.8 * 2039e9)
    assert generation(config, IDEAL, count=2).decode_seconds / 512 == pytest.approx(expected, rel=0.01)


def test_parameters_are_those_of_the_models():
    billions = {name: parameters(ours(name))[0] / 1e9 for name in THEIRS}
    assert billions["llama-13b"] == pytest.approx(13.02, abs=0.01)
    assert billions["llama-2-70b"] == pytest.approx(68.98, abs=0.01)
    assert parameters(MIXTRAL_8X7B) == parameters(ours("mixtral-8x7b"))
    total, active = parameters(MIXTRAL_8X7B)
    assert total == 46_702_792_704 - 4096 * (2 * 32 + 1)  # without the norms
    assert active / 1e9 == pytest.approx(12.75, abs=0.01)
    assert active_packed(MIXTRAL_8X7B) < packed_weights(MIXTRAL_8X7B)[0] < total


def test_less_to_read_is_faster_and_what_does_not_fit_is_said():
    wide, packed = (generation(MIXTRAL_8X7B, A100, 1, bits) for bits in (16, 4))
    assert not wide.fits
    assert packed.fits
    assert 3 < wide.decode_seconds / packed.decode_seconds < 4
    assert generation(MIXTRAL_8X7B, A100, 2).seconds < wide.seconds
    assert generation(MIXTRAL_8X7B, A100, prompt=1024).prefill_seconds > wide.prefill_seconds
