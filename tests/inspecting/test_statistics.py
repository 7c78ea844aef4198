"""The stream, the lens and gradients by layer, against transformers and torch's autograd."""

import numpy as np
import pytest
import torch

from tests.inspecting.models import LAYERS, ROWS, inputs, ready, reference, row_losses, targets, weights


@pytest.fixture(params=(1, 4), ids=("one device", "four devices"))
def model(request, tmp_path_factory):
    return ready(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def states():
    """The residual stream [L + 1, B, T, D], and what attention and MLP add to it [L, B, T, D] each."""
    reference_model, added = reference(), {"self_attn": [], "mlp": []}
    last, hooks = [], []
    for layer in reference_model.model.layers:
        for name, into in added.items():
            module = getattr(layer, name)
            hooks.append(
                module.register_forward_hook(
                    lambda _, __, out, into=into: into.append(out[0] if isinstance(out, tuple) else out)
                )
            )
    hooks.append(reference_model.model.layers[-1].register_forward_hook(
        lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out)
    ))  # fmt: skip
    with torch.no_grad():
        found = reference_model(inputs(), use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    # The last of transformers' hidden states is behind the final norm.
    stream = torch.stack((*found.hidden_states[:-1], last[0]))
    return stream, torch.stack(added["self_attn"]), torch.stack(added["mlp"])


def close(found, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=rtol, atol=atol)


def test_norms_and_cosines_are_those_of_transformers_hidden_states(model, states):
    stream, _, _ = states
    close(np.asarray(model.stream.inputs)[:, :ROWS], stream, atol=1e-4)
    close(model.stream.norm[:, :ROWS], stream.norm(dim=-1))
    close(model.stream.cosine[:, :ROWS], torch.cosine_similarity(stream[:-1], stream[1:], dim=-1))
    assert model.stream.norm.shape[0] == LAYERS + 1
    found = model.statistics.alignment(model.stream.inputs, 4, 1)
    close(found[:ROWS], torch.cosine_similarity(stream[4], stream[1], dim=-1))


def test_what_attention_and_mlp_add_is_told_apart(model, states):
    stream, attention, mlp = states
    between = stream[:-1] + attention
    close(model.stream.attention[:, :ROWS], attention.norm(dim=-1) / stream[:-1].norm(dim=-1))
    close(model.stream.mlp[:, :ROWS], mlp.norm(dim=-1) / between.norm(dim=-1))


def test_the_lens_reads_every_layer_as_transformers_head_would(model, states):
    stream, _, _ = states
    with torch.no_grad():
        logits = reference().lm_head(reference().model.norm(stream))
    found = model.statistics.lens(model.params, model.batch, model.stream.inputs)
    log_probs = logits.log_softmax(-1)
    final = log_probs[-1:].expand_as(log_probs)
    kl = torch.nn.functional.kl_div(log_probs, final, log_target=True, reduction="none").sum(-1)
    close(found["kl"][:, :ROWS], kl, atol=2e-5)
    loss = -log_probs.gather(-1, targets().expand(LAYERS + 1, -1, -1)[..., None])[..., 0]
    close(found["loss"][:, :ROWS], loss)
    close(found["agreement"][:, :ROWS], (logits.argmax(-1) == logits[-1].argmax(-1)).float())
    assert not found["kl"][-1].any()
    assert (found["kl"][:-1].mean((1, 2)) > 1e-3).all()  # a negative control


def test_the_lens_is_the_same_in_chunks_of_tokens(tmp_path_factory, monkeypatch):
    model = ready(tmp_path_factory)
    whole = model.statistics.lens(model.params, model.batch, model.stream.inputs)
    monkeypatch.setattr("solar_jax.training.layer_run.LOGITS", 3 * 320 * 4)  # four of a row's tokens at a time
    assert model.runner.chunks(ROWS) == 4
    cut = type(model.statistics)(model.runner).lens(model.params, model.batch, model.stream.inputs)
    for name, values in whole.items():
        np.testing.assert_allclose(cut[name], values, rtol=1e-5, atol=1e-6)


NAMES = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
         "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}  # fmt: skip
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def test_gradients_by_layer_are_those_of_torch_autograd(model):
    """Gradient norms of the mean loss over the targets that count, by array and by layer input."""
    expected = reference()
    expected.zero_grad()
    kept = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), kept.append(args[0]))[2:] or None)
        for layer in expected.model.layers
    ]
    losses = row_losses(expected(inputs(), use_cache=False).logits)
    (losses.sum() * weights().sum(-1)[0] / weights().sum()).backward()  # rows have equally many targets
    for hook in hooks:
        hook.remove()
    found = model.statistics.gradients(model.params, model.batch, model.stream.inputs)
    for i, layer in enumerate(expected.model.layers):
        for name, part in NAMES.items():
            norm = getattr(getattr(layer, part), name).weight.grad.norm()
            np.testing.assert_allclose(found[name][i], norm, rtol=1e-4, err_msg=f"{name} of layer {i}")
        for name, part in NORMS.items():
            np.testing.assert_allclose(found[name][i], getattr(layer, part).weight.grad.norm(), rtol=1e-4)
        np.testing.assert_allclose(found["stream"][i], kept[i].grad.norm(), rtol=1e-4)
    expected.zero_grad()
    assert set(found) == {*NAMES, *NORMS, "stream"}
