"""Preference losses, rewards and gradients against TRL's trainers, on the same pairs and weights."""

import dataclasses
import math
import os
import warnings

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import PreferenceConfig, TrainConfig
from solar_jax.data.chat.encoding import Rules
from solar_jax.data.chat.pairs import pairs_of, row_with
from solar_jax.data.chat.rows import pack_records
from solar_jax.data.chat.template import NAMED, Template
from solar_jax.data.sources import Document
from solar_jax.errors import UserError
from solar_jax.parallel import rules
from solar_jax.training.preferences import LOSSES, Sides, make_loss, preference_measures, preference_objective
from solar_jax.training.step import make_forward
from tests.conftest import byte_tokenizer, hf_model, save_hf
from tests.parallel.test_mesh import mesh_of

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
LENGTH = 96
WORDS = ["a", "model", "that", "was", "made", "deeper", "learns", "to", "answer", "again", "after", "some", "healing"]
PAIRS = [
    {
        "prompt": " ".join(WORDS[: 2 + i % 3]),
        "chosen": " " + " ".join(WORDS[i : i + 3]),
        "rejected": " " + WORDS[-i - 1],
    }
    for i in range(6)
]


def reference_model() -> transformers.PreTrainedModel:
    return hf_model(seed=1)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's DPO trainer with every pair in one batch."""
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=len(PAIRS), report_to=[], beta=0.3,
        max_length=None, bf16=False, use_cpu=True, gradient_checkpointing=False, label_smoothing=0.1,
    )  # fmt: skip
    made = DPOTrainer(
        hf_model(), ref_model=reference_model(), args=args, train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=fast_tokenizer(),
    )  # fmt: skip
    made.batch = next(iter(made.get_train_dataloader()))
    return made


def fast_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def rules_of(**changes) -> Rules:
    template = Template("none", NAMED["none"])
    return dataclasses.replace(Rules(byte_tokenizer().to_str(), 2, template, "pairs"), **changes)


def rows_of_pairs(known=None):
    documents = [Document(f"p:{i}", "", record) for i, record in enumerate(PAIRS)]
    rows, _ = pack_records(documents, rules_of(), LENGTH)
    if known is None:
        return rows
    return rows, [row_with(rows, i, known) for i in range(len(rows))]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Our forward pass and weights, and rows with the reference's log-probabilities as torch computes them."""
    folder = save_hf(hf_model(), tmp_path_factory.mktemp("ours") / "llama")
    c, mesh = open_checkpoint(str(folder)), mesh_of(1, 1, 1)
    params = load_params(c, rules.parameter_shardings(c.cfg, mesh), np.float32)
    model, known, packed = reference_model(), {}, rows_of_pairs()
    for i in range(len(packed)):
        for key, (tokens, sizes, trained) in pairs_of(packed, i):
            at, sums = 0, []
            for size in sizes:
                ids = torch.tensor(tokens[at : at + size].astype(np.int64))[None]
                with torch.no_grad():
                    logits = model(ids).logits[0, :-1].log_softmax(-1)
                picked = logits.gather(1, ids[0, 1:, None])[:, 0].numpy()
                sums.append(float(picked[trained[at + 1 : at + size]].sum()))
                at += size
            known[key] = tuple(sums)
    _, rows = rows_of_pairs(known)
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    train = TrainConfig(steps=1, batch_size=1, remat="none", precision="float32")
    return c.cfg, make_forward(c.cfg, train, LENGTH, mesh), params, batch


def loss_and_gradient(ours, cfg: PreferenceConfig, batch=None):
    _, forward, params, own = ours
    batch = own if batch is None else batch
    objective = preference_objective(make_loss(cfg), LENGTH)

    def mean(params):
        loss, count, sums = objective.loss(forward(params), objective.whole(batch))
        return loss / count, {name: value / count for name, value in sums.items()}

    (loss, metrics), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return float(loss), {k: float(v) for k, v in metrics.items()}, grads


def assert_same_gradient(grads, model) -> None:
    theirs = [layer.self_attn.q_proj.weight.grad.numpy() for layer in model.model.layers]
    for layer, expected in enumerate(theirs):
        found = np.asarray(grads["layers"]["q_proj"][layer])  # [D, N, H]
        found = found.reshape(found.shape[0], -1).T
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    head = model.lm_head.weight.grad.numpy()
    assert np.linalg.norm(np.asarray(grads["lm_head"]).T - head) <= 1e-4 * np.linalg.norm(head)


OF_TRL = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sft", "sigmoid+sft"]


@pytest.mark.parametrize("kind", OF_TRL)
def test_losses_rewards_and_gradients_are_trls(trainer, ours, kind):
    names = kind.split("+")
    trainer.loss_types, trainer.loss_weights = names, [1.0, 0.7][: len(names)]
    trainer.model.zero_grad()
    expected = trainer.compute_loss(trainer.model, trainer.batch)
    expected.backward()
    # TRL's sigmoid does not smooth labels; its cautious form is checked by hand below.
    smoothing = 0.1 if kind == "robust" else 0.0
    losses = tuple(f"{name}:{weight}" for name, weight in zip(names, trainer.loss_weights, strict=True))
    loss, metrics, grads = loss_and_gradient(ours, PreferenceConfig(losses=losses, beta=0.3, label_smoothing=smoothing))
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert_same_gradient(grads, trainer.model)
    theirs = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    if make_loss(PreferenceConfig(losses=losses)).needs_reference:
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert metrics[name] == pytest.approx(theirs[name], abs=1e-4), name
    for name in ("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
        assert metrics[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_losses_without_a_reference_are_trls(ours, tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "simpo":
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer

            more = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.2}
        else:
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer

            more = {}
        args = Config(
            output_dir=str(tmp_path), per_device_train_batch_size=len(PAIRS), report_to=[], beta=0.3, max_length=256,
            bf16=False, use_cpu=True, gradient_checkpointing=False, remove_unused_columns=False, **more,
        )  # fmt: skip
        tokenizer = fast_tokenizer()
        tokenizer.bos_token = None
        made = Trainer(
            hf_model(), args=args, train_dataset=datasets.Dataset.from_list(PAIRS), processing_class=tokenizer
        )
        expected = made.compute_loss(made.model, next(iter(made.get_train_dataloader())))
        expected.backward()
    loss, _, grads = loss_and_gradient(ours, PreferenceConfig(losses=(kind,), beta=0.3, gamma=0.2))
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert_same_gradient(grads, made.model)


def sides(chosen: float, rejected: float) -> Sides:
    zero, ten = jnp.zeros(1), jnp.full(1, 10.0)
    return Sides(jnp.array([chosen]), jnp.array([rejected]), zero, zero, ten, ten)


def test_cautious_dpo_is_the_formula_worked_out_by_hand():
    loss = make_loss(PreferenceConfig(beta=0.5, label_smoothing=0.2)).of_pairs(sides(1.0, -3.0))
    z = 0.5 * 4.0
    expected = 0.8 * math.log(1 + math.exp(-z)) + 0.2 * math.log(1 + math.exp(z))
    assert float(loss[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [(("sigmoid",), math.log(2)), (("hinge",), 1.0), (("ipo",), 25.0), (("apo_zero", "apo_down:2"), 3.0),
     (("sigmoid", "sft"), None), (("simpo",), None)],
)  # fmt: skip
def test_the_first_loss_is_known_where_policy_and_reference_are_equal(losses, expected):
    found = make_loss(PreferenceConfig(losses=losses, beta=0.1)).at_reference()
    assert found is None if expected is None else found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fault", ["beta squared", "mask off by one", "swapped pair", "doubled BOS"])
def test_faults_that_peers_had_change_the_loss(ours, fault):
    *_, batch = ours
    right, _, _ = loss_and_gradient(ours, PreferenceConfig(beta=0.3))
    cfg, changed = PreferenceConfig(beta=0.3), dict(batch)
    if fault == "beta squared":
        cfg = PreferenceConfig(beta=0.09)
    elif fault == "mask off by one":
        changed["weights"] = jnp.roll(batch["weights"], 1, axis=1)
    elif fault == "swapped pair":
        changed["segment_ids"] = batch["segment_ids"] ^ 1
    else:  # one more token before everything shifts positions and what is seen
        changed["tokens"] = batch["tokens"].at[:, 0].set(1)
    wrong, _, _ = loss_and_gradient(ours, cfg, changed)
    assert abs(wrong - right) > 1e-4


def test_padding_and_the_split_into_microbatches_change_neither_loss_nor_gradient(ours):
    _, forward, params, batch = ours
    objective = preference_objective(make_loss(PreferenceConfig(losses=("sigmoid", "sft"), beta=0.3)), LENGTH)
    filler = {name: jnp.concatenate([x, jnp.zeros_like(x[:1])]) for name, x in batch.items()}
    rows = len(batch["tokens"])

    def summed(params, parts):
        found = [objective.loss(forward(params), part)[:2] for part in parts]
        return sum(loss for loss, _ in found) / sum(count for _, count in found)

    whole = objective.whole(filler)
    split = [{name: x[i : i + 1] for name, x in whole.items()} for i in range(rows + 1)]
    together = jax.value_and_grad(summed)(params, [objective.whole(batch)])
    apart = jax.value_and_grad(summed)(params, split)
    assert float(together[0]) == pytest.approx(float(apart[0]), abs=1e-5)
    for a, b in zip(jax.tree.leaves(together[1]), jax.tree.leaves(apart[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_heldout_measures_are_those_of_the_pairs_themselves(ours, trainer):
    _, forward, params, batch = ours
    loss = make_loss(PreferenceConfig(beta=0.3))
    found = preference_measures(loss, LENGTH, 2)(forward(params), batch)
    trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    expected = trainer.compute_loss(trainer.model, trainer.batch).item()
    means = {name: float(total / count) for name, (total, count) in found.items()}
    assert means["loss"] == pytest.approx(expected, abs=1e-4)
    assert means["accuracy"] == pytest.approx(trainer._metrics["eval"]["rewards/accuracies"][-1], abs=1e-6)
    assert float(found["end_probability"][1]) == 2 * len(PAIRS)


@pytest.mark.parametrize("entry", ["kto", "grpo", "sigmoid:x", "sigmoid:-1", "sigmoid:nan"])
def test_losses_that_are_not_there_are_refused_by_name(entry):
    with pytest.raises(UserError, match=r"config\.preferences\.losses"):
        make_loss(PreferenceConfig(losses=(entry,)))


def test_every_loss_has_a_test_against_trl():
    assert set(LOSSES) == {*"+".join(OF_TRL).split("+"), "simpo", "orpo"}
