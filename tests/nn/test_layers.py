"""Shared layers, compared with torch's own layers, scikit-learn and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from scipy import special
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.nn import layers


def make_skewed_features(rows: int = 200, width: int = 6, seed: int = 0) -> Tensor:
    """Features whose dimensions differ in mean and scale and depend on each other."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) * np.geomspace(0.1, 30, width) + np.arange(width) * 5
    return torch.tensor(x, dtype=torch.float32)


class TestDropout:
    def test_zeroes_a_fraction_of_the_entries_and_keeps_the_mean(self) -> None:
        torch.manual_seed(0)
        y = layers.Dropout(0.3)(torch.full((64, 5000), 3.0))
        assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
        assert float(y.mean()) == pytest.approx(3.0, abs=0.02)
        torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 3.0 / 0.7))

    def test_probability_0_and_prediction_change_nothing_and_draw_nothing(self) -> None:
        x, state = make_skewed_features(), torch.get_rng_state()
        assert layers.Dropout(0.0)(x) is x
        assert layers.Dropout(0.5).eval()(x) is x
        assert torch.equal(torch.get_rng_state(), state)


def test_hyperparameters_are_scalar_buffers_outside_the_checkpoint() -> None:
    module = nn.Linear(2, 2)
    layers.register_hyperparameters(module, tau=0.07, w_ce=1)
    buffers = dict(module.named_buffers())
    assert {name: (tuple(b.shape), b.dtype) for name, b in buffers.items()} == {
        "tau": ((), torch.float32),
        "w_ce": ((), torch.float32),
    }
    assert float(buffers["tau"]) == pytest.approx(0.07)
    assert set(module.state_dict()) == {"weight", "bias"}


class TestMLP:
    def test_is_linear_layers_with_gelu_between(self) -> None:
        mlp, x = layers.MLP([6, 10, 7, 3], dropout=0.9), make_skewed_features(width=6)
        a, b, c = mlp.layers
        torch.testing.assert_close(mlp.eval()(x), nn.Sequential(a, nn.GELU(), b, nn.GELU(), c)(x))

    def test_each_hidden_layer_draws_its_own_mask(self) -> None:
        mlp = layers.MLP([4, 4, 4, 4], dropout=0.5)
        for parameter in mlp.parameters():
            _ = nn.init.eye_(parameter) if parameter.ndim == 2 else nn.init.zeros_(parameter)
        torch.manual_seed(0)
        y = mlp(torch.full((1000, 4), 20.0))  # GELU is the identity here
        assert float((y != 0).float().mean()) == pytest.approx(0.25, abs=0.03)
        assert sorted(set(y.flatten().tolist())) == [0.0, 80.0]

    def test_an_ensemble_with_different_dropout_equals_a_loop_over_models(self) -> None:
        mlps, x = [layers.MLP([6, 8, 3], dropout=p) for p in (0.1, 0.2, 0.6)], make_skewed_features(20)
        stacked = torch.func.stack_module_state(mlps)

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(mlps[0], {**parameters, **buffers}, (x,))

        def seeded(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
            torch.manual_seed(0)
            return function(*inputs)

        expected = torch.stack([seeded(mlp, x) for mlp in mlps])
        torch.testing.assert_close(seeded(torch.func.vmap(run, randomness="same"), *stacked), expected)


def test_the_parts_of_a_concat_linear_sum_to_one_linear_layer() -> None:
    layer = layers.ConcatLinear([2, 5, 3], 7)
    parts = torch.randn(4, 2), torch.randn(4, 5), torch.randn(4, 3)
    expected = nn.functional.linear(torch.cat(parts, dim=1), torch.cat(list(layer.weights), dim=1), layer.bias)
    torch.testing.assert_close(sum(layer(i, x) for i, x in enumerate(parts)), expected)
    torch.testing.assert_close(layer(2, parts[2], layer(1, parts[1], layer(0, parts[0]))), expected)
    torch.testing.assert_close(layer(0, parts[0], layer(1, parts[1], layer(2, parts[2]))), expected)  # part 0 has the bias
    torch.testing.assert_close(layer(2, parts[2][0], layer(0, parts[0]) + layer(1, parts[1]))[0], expected[0])
    assert all(weight.is_contiguous() and weight.requires_grad for weight in layer.weights)


class TestStandardise:
    def test_per_dim_is_sklearns_standard_scaler(self) -> None:
        x, layer = make_skewed_features(), layers.Standardise("per_dim", 6)
        layer.fit(x.split(64))
        np.testing.assert_allclose(layer(x), StandardScaler().fit_transform(x.numpy()), atol=1e-5)

    def test_global_keeps_the_geometry(self) -> None:
        x, layer = make_skewed_features(), layers.Standardise("global", 6)
        layer.fit(x.split(64))
        y = layer(x)
        torch.testing.assert_close(torch.pdist(y) / torch.pdist(x), torch.full((199 * 100,), float(1 / layer.std[0])))
        assert float(y.mean(0).abs().max()) < 1e-5
        assert float(y.square().mean()) == pytest.approx(1.0, abs=1e-5)

    def test_l2sqrtd_gives_unit_mean_square_to_each_row_without_statistics(self) -> None:
        x, layer = make_skewed_features(), layers.Standardise("l2sqrtd", 6)
        layer.fit([])
        torch.testing.assert_close(layer(x), x / x.norm(dim=1, keepdim=True) * math.sqrt(6))
        torch.testing.assert_close(layer(x).square().mean(1), torch.ones(200))

    def test_a_constant_dimension_is_mapped_to_0(self) -> None:
        x = make_skewed_features()
        x[:, 2] = 7.0
        layer = layers.Standardise("per_dim", 6)
        layer.fit([x])
        assert float(layer.std[2]) == pytest.approx(1e-3)
        assert float(layer(x)[:, 2].abs().max()) == 0.0

    def test_rows_that_are_not_finite_are_left_out(self) -> None:
        x = make_skewed_features()
        broken = torch.cat([x, x[:3]])
        broken[200, 1], broken[201, 0], broken[202] = math.nan, math.inf, math.nan
        with_broken, without = layers.Standardise("per_dim", 6), layers.Standardise("per_dim", 6)
        with_broken.fit([broken[200:], *broken[:200].split(50)])
        without.fit(x.split(50))
        assert torch.equal(with_broken.mean, without.mean)
        assert torch.equal(with_broken.std, without.std)

    def test_statistics_are_part_of_the_checkpoint(self) -> None:
        assert set(layers.Standardise("per_dim", 6).state_dict()) == {"mean", "std"}

    def test_a_split_without_a_finite_row_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no finite feature row"):
            layers.Standardise("per_dim", 2).fit([torch.full((3, 2), math.nan)])


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_moments_survive_a_large_mean(batch: int) -> None:
    x = make_skewed_features().double() + 1e7
    mean, variance = layers.moments(x.split(batch))
    _, covariance = layers.moments(x.split(batch), full_covariance=True)
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(variance, x.numpy().var(0), rtol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(x.numpy().T, bias=True), rtol=1e-6, atol=1e-4)


class TestTimeEmbedding:
    @pytest.mark.parametrize("width", [4, 128])
    def test_the_sinusoid_is_that_of_diffusers(self, width: int) -> None:
        n = torch.tensor([0, 1, 17, 999, 1799])
        oracle = get_timestep_embedding(n, width, flip_sin_to_cos=False, downscale_freq_shift=1)
        torch.testing.assert_close(layers.sinusoidal_embedding(n, width), oracle, atol=2e-4, rtol=0)

    def test_frequencies_run_from_1_to_1e_minus_4(self) -> None:
        value = layers.sinusoidal_embedding(torch.tensor(1), 128)
        assert float(value[0]) == pytest.approx(math.sin(1.0))
        assert float(value[63]) == pytest.approx(math.sin(1e-4))
        assert float(value[64]) == pytest.approx(math.cos(1.0))

    @torch.no_grad()
    def test_any_shape_of_steps(self) -> None:
        embed = layers.TimeEmbedding(2000, 16)
        n = torch.arange(6)
        torch.testing.assert_close(embed(n.reshape(2, 3)), embed(n).reshape(2, 3, 16))
        assert float(torch.pdist(embed(torch.arange(0, 1800, 100))).min()) > 0

    @pytest.mark.parametrize("width", [0, 2, 7])
    def test_impossible_widths_are_refused(self, width: int) -> None:
        with pytest.raises(ValueError, match="even number"):
            layers.TimeEmbedding(2000, width)


class TestTokens:
    def test_each_chunk_has_its_own_linear_layer(self) -> None:
        tokens, x = layers.ChunkTokens(12, 3, 5), torch.randn(7, 12)
        for t in range(3):
            expected = F.linear(x[:, 4 * t : 4 * t + 4], tokens.weight[t].T, tokens.bias[t])
            torch.testing.assert_close(tokens(x)[:, t], expected)

    def test_an_impossible_number_of_tokens_is_refused_with_the_choices(self) -> None:
        with pytest.raises(ValueError, match=r"choose num_tokens from: 1, 2, 3, 4, 6, 12$"):
            layers.ChunkTokens(12, 5, 4)

    @pytest.mark.parametrize("num_heads", [1, 2, 4])
    def test_attention_is_the_equation(self, num_heads: int) -> None:
        """softmax(Q K^T / sqrt(d_k)) V, with loops over samples and heads."""
        q, k, v = torch.randn(3, 5, 8), torch.randn(3, 6, 8), torch.randn(3, 6, 8)
        found = layers.multi_head_attention(q, torch.cat([k, v], dim=-1), num_heads)
        for sample in range(3):
            for head in np.split(np.arange(8), num_heads):
                queries, keys, values = (x[sample][:, head].double().numpy() for x in (q, k, v))
                weights = special.softmax(queries @ keys.T / math.sqrt(len(head)), axis=1)
                np.testing.assert_allclose(found[sample][:, head], weights @ values, atol=1e-5)

    def test_a_single_key_gets_weight_1_whatever_the_query(self) -> None:
        value = torch.randn(3, 1, 8)
        for query in (torch.randn(3, 1, 8), 100 * torch.randn(3, 1, 8)):
            torch.testing.assert_close(
                layers.multi_head_attention(query, torch.cat([torch.randn(3, 1, 8), value], dim=-1), 2), value
            )

    def test_the_encoder_layer_is_torchs(self) -> None:
        ours, tokens = layers.TransformerLayer(8, 2), torch.randn(3, 5, 8)
        theirs = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        up, down = ours.mlp.layers
        pairs = [
            (theirs.norm1, ours.norm_attention),
            (theirs.norm2, ours.norm_mlp),
            (theirs.linear1, up),
            (theirs.linear2, down),
        ]
        for target, source in [*pairs, (theirs.self_attn.out_proj, ours.attention.out)]:
            target.load_state_dict(source.state_dict())
        with torch.no_grad():
            theirs.self_attn.in_proj_weight.copy_(ours.attention.query_key_value.weight)
            theirs.self_attn.in_proj_bias.copy_(ours.attention.query_key_value.bias)
        torch.testing.assert_close(ours(tokens), theirs(tokens))

    def test_heads_must_divide_the_width(self) -> None:
        with pytest.raises(ValueError, match="num_heads 3"):
            layers.SelfAttention(8, 3)


class TestAdapter:
    def test_its_logits_use_batch_normalisation(self) -> None:
        adapter, x = layers.Adapter(6, 4, 3), make_skewed_features()
        expected = adapter.classifier(nn.BatchNorm1d(4, affine=False)(adapter.project(x)))
        torch.testing.assert_close(adapter.logits(x, torch.ones(len(x))), expected)

    def test_rows_of_weight_0_do_not_enter_the_statistics(self) -> None:
        adapter, x = layers.Adapter(6, 4, 3), make_skewed_features()
        weight = (torch.arange(len(x)) % 3 > 0).float()
        counted = weight > 0
        expected = adapter.classifier(nn.BatchNorm1d(4, affine=False)(adapter.project(x[counted])))
        garbage = torch.where(counted[:, None], x, 1e3)
        torch.testing.assert_close(adapter.logits(garbage, weight)[counted], expected)
        assert adapter.logits(x, torch.zeros(len(x))).isfinite().all()

    def test_standardise_with_exact_statistics_replaces_batch_normalisation(self) -> None:
        adapter, x, standardise = layers.Adapter(6, 4, 3), make_skewed_features(), layers.Standardise("per_dim", 4)
        standardise.fit(adapter.feature(part).detach() for part in x.split(64))
        torch.testing.assert_close(
            adapter.classifier(standardise(adapter.feature(x))), adapter.logits(x, torch.ones(len(x))), atol=1e-4, rtol=1e-4
        )

    def test_pca_is_sklearns_up_to_sign(self) -> None:
        adapter, x = layers.Adapter(6, 3, 2), make_skewed_features()
        adapter.fit_pca(x.split(64))
        ours, theirs = adapter.feature(x).detach().numpy(), PCA(3).fit_transform(x.numpy())
        np.testing.assert_allclose(ours * np.sign((ours * theirs).sum(0)), theirs, atol=2e-3)
        assert (adapter.project.weight.gather(1, adapter.project.weight.abs().argmax(1, keepdim=True)) > 0).all()

    def test_pca_cannot_widen(self) -> None:
        with pytest.raises(ValueError, match="cannot widen 3 features to 6"):
            layers.Adapter(3, 6, 2).fit_pca([torch.zeros(4, 3)])


class Formats(TorchDispatchMode):
    """Collects the number formats that the products and the softmax of an attention return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in ("aten::bmm", "aten::_safe_softmax"):
            self.found.setdefault(func.name(), set()).add(result.dtype)
        return result


def test_attention_on_a_gpu_computes_in_the_same_format_alone_and_stacked() -> None:
    """In bfloat16, stacked, the softmax would have no gradient on a GPU; the tensors here only pretend to be on one."""
    attend = partial(layers.multi_head_attention, num_heads=2)
    found = []
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        query, key_value = (torch.empty(3, 5, 4, width, dtype=torch.bfloat16, device="cuda") for width in (8, 16))
        torch.set_autocast_enabled("cuda", True)
        try:
            for call, tensors in ((attend, (query[0], key_value[0])), (torch.vmap(attend), (query, key_value))):
                with Formats() as formats:
                    assert call(*tensors).dtype == torch.bfloat16
                found.append(formats.found)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert found == [{"aten::bmm": {torch.float32}, "aten::_safe_softmax": {torch.float32}}] * 2
