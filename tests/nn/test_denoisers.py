"""Every denoiser depends on its inputs only, not on other rows of the batch, and several can run as one ensemble."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from pipeline.nn.denoisers import PFIN, ConcatMLP, CrossAttention, Denoiser, Interaction
from pipeline.nn.unet import UNet
from pipeline.runtime.rng import KeyedRNG

WIDTH, ROWS = 32, 9
NO_DROPOUT = torch.tensor(0.0)
TOKENS: dict[str, Any] = {"num_tokens": 4, "token_width": 16, "num_heads": 2, "time_width": 16}


def pfin_builder(interaction: Interaction, residual: bool) -> Callable[[], Denoiser]:
    return lambda: PFIN(WIDTH, interaction, residual=residual, **TOKENS)


BUILDERS: dict[str, Callable[[], Denoiser]] = {
    "mlp": lambda: ConcatMLP(WIDTH, WIDTH, hidden=48, time_width=16),
    "unet": lambda: UNet(WIDTH, time_width=16),
    **{
        f"{kind}{'+residual' * has_residual}": pfin_builder(kind, has_residual)
        for kind in get_args(Interaction)
        for has_residual in (False, True)
    },
}
denoisers = pytest.mark.parametrize("name", BUILDERS)


class DenoiserFunction(nn.Module):
    """A denoiser as one function of all its inputs, for torch.func."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_n: Tensor, n: Tensor, x_v: Tensor, rng: KeyedRNG | None = None, p: Tensor = NO_DROPOUT) -> Tensor:
        return self.denoiser(x_n, self.denoiser.embed_step(n), self.denoiser.image_context(x_v), rng, p)


def build(name: str, seed: int = 0) -> DenoiserFunction:
    torch.manual_seed(seed)
    return DenoiserFunction(BUILDERS[name]())


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_n, x_v = torch.randn(2, ROWS, WIDTH, generator=generator)
    return x_n, torch.randint(0, 1000, (ROWS,), generator=generator), x_v


@denoisers
@torch.no_grad()
def test_output_depends_on_every_input(name: str) -> None:
    model, (x_n, n, x_v) = build(name), make_inputs()
    out = model(x_n, n, x_v)
    assert out.shape == (ROWS, WIDTH)
    for changed in (model(x_n.roll(1, 0), n, x_v), model(x_n, n.roll(1), x_v), model(x_n, n, x_v.roll(1, 0))):
        assert float((changed - out).abs().max(dim=1).values.min()) > 1e-5


@denoisers
@torch.no_grad()
def test_a_row_does_not_depend_on_the_other_rows(name: str) -> None:
    model, (x_n, n, x_v) = build(name), make_inputs()
    out = model(x_n, n, x_v)
    for i in range(ROWS):
        rows = slice(i, i + 1)
        torch.testing.assert_close(model(x_n[rows], n[rows], x_v[rows]), out[rows], atol=1e-5, rtol=0)
    poisoned = x_v.clone()
    poisoned[1:] = math.nan
    torch.testing.assert_close(model(x_n, n, poisoned)[0], out[0], atol=1e-5, rtol=0)


@denoisers
@torch.no_grad()
def test_one_row_of_the_step_table_can_serve_a_batch(name: str) -> None:
    model, (x_n, _, x_v) = build(name), make_inputs()
    table, context = model.denoiser.embed_step(torch.tensor([999, 499, 0])), model.denoiser.image_context(x_v)
    for k, n in enumerate((999, 499, 0)):
        ours = model.denoiser(x_n, table[k], context, None, NO_DROPOUT)
        torch.testing.assert_close(ours, model(x_n, torch.full((ROWS,), n), x_v), atol=1e-6, rtol=1e-5)


@denoisers
def test_dropout_comes_from_the_stream_and_only_in_training(name: str) -> None:
    model, (x_n, n, x_v) = build(name), make_inputs()
    rng, half = KeyedRNG.seeded(0, torch.arange(ROWS)), torch.tensor(0.5)
    without_dropout = model(x_n, n, x_v)
    with_dropout = model(x_n, n, x_v, rng, half)
    assert not torch.allclose(with_dropout, without_dropout)
    assert torch.equal(model(x_n, n, x_v, rng, half), with_dropout)
    assert not torch.equal(model(x_n, n, x_v, rng.at("next step"), half), with_dropout)
    assert torch.equal(model(x_n, n, x_v, rng, NO_DROPOUT), without_dropout)
    assert torch.equal(model(x_n, n, x_v, None, half), without_dropout)
    assert torch.equal(model.eval()(x_n, n, x_v, rng, half), without_dropout)


@denoisers
def test_an_ensemble_and_its_gradients_equal_a_loop_over_models(name: str) -> None:
    models, (x_n, n, x_v) = [build(name, seed) for seed in range(3)], make_inputs()
    keys = torch.tensor([KeyedRNG.seeded(seed, torch.arange(ROWS)).key for seed in range(3)])
    ps = torch.tensor([0.0, 0.1, 0.5])

    def loss(parameters: dict[str, Tensor], key: Tensor, p: Tensor) -> Tensor:
        rng = KeyedRNG(key, torch.arange(ROWS))
        return torch.func.functional_call(models[0], parameters, (x_n, n, x_v, rng, p)).square().mean()

    stacked, _ = torch.func.stack_module_state(models)
    gradients, losses = torch.func.vmap(torch.func.grad_and_value(loss))(stacked, keys, ps)
    for i, model in enumerate(models):
        value = model(x_n, n, x_v, KeyedRNG(keys[i], torch.arange(ROWS)), ps[i]).square().mean()
        value.backward()
        torch.testing.assert_close(losses[i], value.detach(), atol=1e-6, rtol=1e-5)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[key][i], parameter.grad, atol=1e-6, rtol=1e-3)


@denoisers
def test_every_parameter_gets_a_gradient_and_the_loss_falls(name: str) -> None:
    model, (x_n, n, x_v) = build(name), make_inputs()
    target = torch.tanh(x_v + 0.1 * x_n)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (model(x_n, n, x_v) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_concat_mlp_is_four_linear_layers_on_the_concatenation() -> None:
    model, (x_n, n, _) = ConcatMLP(WIDTH, 20, hidden=48, time_width=16), make_inputs()
    x_v = torch.randn(ROWS, 20)
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer not in list(model.embed.modules())]
    assert len(linear) == 3  # the first layer is a ConcatLinear
    b, c, d = linear
    first = torch.cat(list(model.first.weights), dim=1)
    hidden = nn.functional.linear(torch.cat([x_n, x_v, model.embed(n)], dim=1), first, model.first.bias)
    expected = nn.Sequential(nn.GELU(), b, nn.GELU(), c, nn.GELU(), d)(hidden)
    torch.testing.assert_close(model(x_n, model.embed_step(n), model.image_context(x_v), None, NO_DROPOUT), expected)


def test_pfin_concat_is_a_two_layer_decoder_on_the_concatenation() -> None:
    model, (x_n, n, x_v) = PFIN(WIDTH, "concat", time_width=16), make_inputs()
    h_0 = torch.cat([x_n, model.embed(n), x_v], dim=1)
    hidden = nn.functional.linear(h_0, torch.cat(list(model.first.weights), dim=1), model.first.bias)
    expected = model.out(nn.functional.gelu(hidden))
    torch.testing.assert_close(model(x_n, model.embed_step(n), model.image_context(x_v), None, NO_DROPOUT), expected)


def test_with_one_token_per_modality_the_noisy_text_has_no_influence() -> None:
    """This is why vectors are cut into chunks: a softmax over one key is 1."""
    x_n, n, x_v = make_inputs()
    one_token = DenoiserFunction(PFIN(WIDTH, num_tokens=1, token_width=16, num_heads=2, residual=False))
    torch.testing.assert_close(one_token(x_n, n, x_v), one_token(x_n.roll(1, 0), n, x_v))
    two_tokens = DenoiserFunction(PFIN(WIDTH, num_tokens=2, token_width=16, num_heads=2, residual=False))
    assert not torch.allclose(two_tokens(x_n, n, x_v), two_tokens(x_n.roll(1, 0), n, x_v))


def test_the_residual_adds_the_noisy_text_to_the_output_of_the_attention() -> None:
    (x_n, n, x_v), with_residual = make_inputs(), PFIN(WIDTH, residual=True, **TOKENS)
    without = PFIN(WIDTH, residual=False, **TOKENS)
    for model in (with_residual, without):
        assert isinstance(model.interaction, CrossAttention)
        nn.init.zeros_(model.interaction.out.weight)
    assert not torch.allclose(
        DenoiserFunction(with_residual)(x_n, n, x_v), DenoiserFunction(with_residual)(x_n.roll(1, 0), n, x_v)
    )
    assert torch.allclose(DenoiserFunction(without)(x_n, n, x_v), DenoiserFunction(without)(x_n.roll(1, 0), n, x_v))


def test_self_attention_sees_the_step_as_a_token() -> None:
    model, (x_n, n, x_v) = PFIN(WIDTH, "self_attention", time_width=16), make_inputs()
    nn.init.zeros_(model.first.weights[1])  # now the step can act only through its token
    assert not torch.allclose(DenoiserFunction(model)(x_n, n, x_v), DenoiserFunction(model)(x_n, n.roll(1), x_v))


@pytest.mark.parametrize(("width", "side"), [(64, 8), (65, 16), (384, 24), (768, 32), (1024, 32), (1280, 40)])
def test_the_side_of_the_unet_is_the_next_multiple_of_8(width: int, side: int) -> None:
    model = UNet(width, time_width=16)
    assert model.side == side
    context = model.image_context(torch.zeros(2, width))
    assert context.shape == (2, 8, side, side)
    assert model(torch.zeros(2, width), model.embed_step(torch.tensor(3)), context, None, NO_DROPOUT).shape == (2, width)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 7 tokens; choose num_tokens from: 1, 2, 4, 8, 16, 32"):
        PFIN(WIDTH, num_tokens=7)
    with pytest.raises(ValueError, match="token_width 10 is not divisible by num_heads 4"):
        PFIN(WIDTH, token_width=10)
    with pytest.raises(ValueError, match="at least 2"):
        ConcatMLP(4, 4, num_layers=1)
