"""Every denoiser depends on its inputs only, not on other rows of the batch, and several can run as one ensemble."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.nn.denoisers import PFIN, ConcatMLP, CrossAttention, Denoiser, Interaction, Residual
from pipeline.nn.unet import UNet

WIDTH, ROWS = 32, 9
T = 1000
TOKENS: dict[str, Any] = {"num_tokens": 4, "token_width": 16, "num_heads": 2, "time_width": 16}


def pfin_builder(interaction: Interaction, residual: Residual) -> Callable[[float], Denoiser]:
    return lambda dropout: PFIN(WIDTH, T, interaction, residual=residual, dropout=dropout, **TOKENS)


BUILDERS: dict[str, Callable[[float], Denoiser]] = {
    "mlp": lambda dropout: ConcatMLP(WIDTH, WIDTH, T, hidden=48, time_width=16, dropout=dropout),
    "unet": lambda dropout: UNet(WIDTH, T, time_width=16, dropout=dropout),
    **{
        f"{kind}+{residual}": pfin_builder(kind, residual)
        for kind in get_args(Interaction)
        for residual in (("none",) if kind == "concat" else get_args(Residual))
    },
}
denoisers = pytest.mark.parametrize("name", BUILDERS)


class DenoiserFunction(nn.Module):
    """A denoiser as one function of all its inputs, for torch.func."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_n: Tensor, n: Tensor, x_v: Tensor) -> Tensor:
        return self.denoiser(x_n, self.denoiser.embed_step(n), self.denoiser.image_context(x_v))


def build(name: str, seed: int = 0, dropout: float = 0.0) -> DenoiserFunction:
    torch.manual_seed(seed)
    return DenoiserFunction(BUILDERS[name](dropout))


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
        ours = model.denoiser(x_n, table[k], context)
        torch.testing.assert_close(ours, model(x_n, torch.full((ROWS,), n), x_v), atol=1e-6, rtol=1e-5)


@denoisers
def test_dropout_acts_in_training_only(name: str) -> None:
    model, (x_n, n, x_v) = build(name, dropout=0.5), make_inputs()
    without_dropout = build(name)(x_n, n, x_v)
    torch.manual_seed(0)
    with_dropout = model(x_n, n, x_v)
    assert not torch.allclose(with_dropout, without_dropout)
    assert not torch.equal(model(x_n, n, x_v), with_dropout)
    torch.manual_seed(0)
    assert torch.equal(model(x_n, n, x_v), with_dropout)
    assert torch.equal(model.eval()(x_n, n, x_v), without_dropout)


@denoisers
def test_an_ensemble_and_its_gradients_equal_a_loop_over_models(name: str) -> None:
    models, (x_n, n, x_v) = [build(name, seed, p) for seed, p in enumerate((0.05, 0.1, 0.5))], make_inputs()

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], {**parameters, **buffers}, (x_n, n, x_v)).square().mean()

    torch.manual_seed(0)
    stacked = torch.func.stack_module_state(models)
    with sdpa_kernel(SDPBackend.MATH):
        gradients, losses = torch.func.vmap(torch.func.grad_and_value(loss), randomness="same")(*stacked)
    for i, model in enumerate(models):
        torch.manual_seed(0)
        value = model(x_n, n, x_v).square().mean()
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
    model, (x_n, n, _) = ConcatMLP(WIDTH, 20, T, hidden=48, time_width=16), make_inputs()
    x_v = torch.randn(ROWS, 20)
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer not in list(model.embed.modules())]
    assert len(linear) == 3  # the first layer is a ConcatLinear
    b, c, d = linear
    first = torch.cat(list(model.first.weights), dim=1)
    hidden = nn.functional.linear(torch.cat([x_n, x_v, model.embed(n)], dim=1), first, model.first.bias)
    expected = nn.Sequential(nn.GELU(), b, nn.GELU(), c, nn.GELU(), d)(hidden)
    torch.testing.assert_close(model(x_n, model.embed_step(n), model.image_context(x_v)), expected)


def test_pfin_concat_is_a_two_layer_decoder_on_the_concatenation() -> None:
    model, (x_n, n, x_v) = PFIN(WIDTH, T, "concat", time_width=16), make_inputs()
    h_0 = torch.cat([x_n, model.embed(n), x_v], dim=1)
    hidden = nn.functional.linear(h_0, torch.cat(list(model.first.weights), dim=1), model.first.bias)
    expected = model.out(nn.functional.gelu(hidden))
    torch.testing.assert_close(model(x_n, model.embed_step(n), model.image_context(x_v)), expected)


def test_with_one_token_per_modality_the_noisy_text_has_no_influence() -> None:
    """This is why vectors are cut into chunks: a softmax over one key is 1."""
    x_n, n, x_v = make_inputs()
    one_token = DenoiserFunction(PFIN(WIDTH, T, num_tokens=1, token_width=16, num_heads=2, residual="none"))
    torch.testing.assert_close(one_token(x_n, n, x_v), one_token(x_n.roll(1, 0), n, x_v))
    two_tokens = DenoiserFunction(PFIN(WIDTH, T, num_tokens=2, token_width=16, num_heads=2, residual="none"))
    assert not torch.allclose(two_tokens(x_n, n, x_v), two_tokens(x_n.roll(1, 0), n, x_v))


@pytest.mark.parametrize(
    ("residual", "reads"), [("none", set()), ("text", {"text"}), ("visual", {"image"}), ("both", {"text", "image"})]
)
def test_the_residual_goes_around_the_attention(residual: Residual, reads: set[str]) -> None:
    """When the attention says nothing, the output depends on what the residual adds, and on nothing else."""
    (x_n, n, x_v), network = make_inputs(), PFIN(WIDTH, T, residual=residual, **TOKENS)
    assert isinstance(network.interaction, CrossAttention)
    nn.init.zeros_(network.interaction.out.weight)
    model = DenoiserFunction(network)
    out = model(x_n, n, x_v)
    changed = {"text": model(x_n.roll(1, 0), n, x_v), "image": model(x_n, n, x_v.roll(1, 0))}
    assert {name for name, other in changed.items() if not torch.allclose(other, out)} == reads


@pytest.mark.parametrize("width", [64, 384, 768, 1024])
@torch.no_grad()
def test_at_initialisation_the_decoder_sees_the_image(width: int) -> None:
    """The share of the variance of F_t that x_v explains, with x_n at the noise of a middle step (unit variance)."""

    def visual_share(residual: Residual) -> float:
        torch.manual_seed(0)
        network = PFIN(width, T, residual=residual)
        x_v, x_n = torch.randn(8, width).repeat_interleave(32, 0), torch.randn(256, width)
        seen: list[Tensor] = []
        network.first.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[1]))
        network(x_n, network.embed_step(torch.full((256,), 500)), network.image_context(x_v))
        f_t = seen[0].unflatten(0, (8, 32))  # 32 noises for each of 8 images
        return float(f_t.mean(1).var(0).sum() / f_t.flatten(0, 1).var(0).sum())

    assert visual_share("visual") >= 0.2
    assert visual_share("text") < 0.1


def test_self_attention_sees_the_step_as_a_token() -> None:
    model, (x_n, n, x_v) = PFIN(WIDTH, T, "self_attention", time_width=16), make_inputs()
    nn.init.zeros_(model.first.weights[1])  # now the step can act only through its token
    assert not torch.allclose(DenoiserFunction(model)(x_n, n, x_v), DenoiserFunction(model)(x_n, n.roll(1), x_v))


@pytest.mark.parametrize(("width", "side"), [(64, 8), (65, 16), (384, 24), (768, 32), (1024, 32), (1280, 40)])
def test_the_side_of_the_unet_is_the_next_multiple_of_8(width: int, side: int) -> None:
    model = UNet(width, T, time_width=16)
    assert model.side == side
    context = model.image_context(torch.zeros(2, width))
    assert context.shape == (2, 8, side, side)
    assert model(torch.zeros(2, width), model.embed_step(torch.tensor(3)), context).shape == (2, width)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 7 tokens; choose num_tokens from: 1, 2, 4, 8, 16, 32"):
        PFIN(WIDTH, T, num_tokens=7)
    with pytest.raises(ValueError, match="token_width 10 is not divisible by num_heads 4"):
        PFIN(WIDTH, T, token_width=10)
    with pytest.raises(ValueError, match="at least 2"):
        ConcatMLP(4, 4, T, num_layers=1)
