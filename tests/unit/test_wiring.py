"""Which module is which site; and no guess where that is not clear."""

import pytest
import torch
from steerscope.catalog.model import Site
from steerscope.engine import wiring
from steerscope.errors import UnsupportedEngineError
from torch import nn


class FusedNorm(nn.Module):
    """As vLLM's: ``forward`` passes on, ``forward_native`` names the arguments."""

    def forward(self, *args, **kwargs):
        return self.forward_native(*args, **kwargs)

    def forward_native(self, x, residual=None):
        return (x, x) if residual is None else (x + residual, x + residual)


class Twice(nn.Module):
    def forward(self, hidden_states):
        return 2 * hidden_states


class Layer(nn.Module):
    def __init__(self, **added):
        super().__init__()
        self.input_layernorm = FusedNorm()
        self.self_attn = Twice()
        self.post_attention_layernorm = FusedNorm()
        self.mlp = Twice()
        for name, module in added.items():
            setattr(self, name, module)

    def forward(self, positions, hidden_states, residual):
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


def seen(layer, site, residual):
    streams = []
    wiring.attach(layer, site, lambda h, r: streams.append(h.clone() if r is None else h + r))
    layer(None, torch.ones(1), residual)
    (stream,) = streams
    return float(stream)


@pytest.mark.parametrize("residual", [None, torch.full((1,), 3.0)])
def test_each_site_is_the_tensor_of_its_name(residual):
    # In: x. Attention adds 2x, the MLP twice what it then reads.
    x = 1.0 if residual is None else 4.0
    expected = {
        Site.RESID_PRE: x,
        Site.ATTN_OUT: 2 * x,
        Site.RESID_MID: 3 * x,
        Site.MLP_IN: 3 * x,
        Site.MLP_OUT: 6 * x,
        Site.RESID_POST: 9 * x,
    }
    assert {site: seen(Layer(), site, residual) for site in Site} == expected


def test_a_layer_with_other_norms_has_only_the_sites_around_it():
    layer = Layer(extra_norm=FusedNorm())
    for site in (Site.RESID_MID, Site.ATTN_OUT, Site.MLP_OUT):
        with pytest.raises(UnsupportedEngineError, match=f"no site {site} known in Layer"):
            wiring.attach(layer, site, print)
    assert seen(layer, Site.RESID_PRE, None) == 1.0


def test_a_layer_that_scales_what_it_adds_is_not_guessed_at():
    layer = Layer()
    layer.residual_multiplier = 0.2
    with pytest.raises(UnsupportedEngineError, match="residual_multiplier"):
        wiring.attach(layer, Site.MLP_OUT, print)


def test_a_layer_without_an_mlp_is_refused():
    layer = Layer()
    del layer.mlp
    with pytest.raises(UnsupportedEngineError, match="it has no mlp or block_sparse_moe"):
        wiring.attach(layer, Site.MLP_IN, print)


def test_a_module_that_hides_its_arguments_is_refused():
    class Opaque(nn.Module):
        def forward(self, *args):
            return args

    with pytest.raises(UnsupportedEngineError, match="does not name its arguments"):
        wiring.attach(Layer(post_attention_layernorm=Opaque()), Site.RESID_MID, print)


def test_two_stacks_of_the_same_depth_are_not_chosen_between():
    model = nn.Module()
    model.text = nn.ModuleList(Layer() for _ in range(3))
    assert list(wiring.decoder_layers(model, 3, nn.Identity)) == [0, 1, 2]
    model.vision = nn.ModuleList(Layer() for _ in range(3))
    with pytest.raises(UnsupportedEngineError, match="2 lists of 3 layers"):
        wiring.decoder_layers(model, 3, nn.Identity)
