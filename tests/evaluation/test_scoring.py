"""Log-probabilities are those of transformers, whether beginnings are shared or not, and whatever shares a row."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import MeshConfig
from solar_jax.evaluation.scoring import Scored, Scorer
from solar_jax.evaluation.trie import Query, TrieRow, pack_queries
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh
from tests.conftest import hf_model, save_hf

KINDS = {"llama": {}, "mistral": {"sliding_window": 24}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> pathlib.Path:
    return save_hf(hf_model(request.param, **KINDS[request.param]), tmp_path_factory.mktemp("score") / request.param)


def queries() -> list[Query]:
    """Items with endings after a common context, contexts after a common prefix, and strangers."""
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(3, 259, n).tolist())  # noqa: E731
    found = []
    for prefix in (draw(30), draw(12), ()):
        for _ in range(3):
            context = prefix + draw(9)
            for length in (1, 3, 8, 3):
                ending = draw(length)
                found.append(Query((context + ending)[:-1], ending))
    same = found[0]
    return [*found, same, dataclasses.replace(same, targets=draw(1)), Query((5,), (7,)), Query(draw(200), draw(200))]


@pytest.fixture(scope="module")
def expected(folder) -> list[Scored]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for query in queries():
        with torch.no_grad():
            logits = model(torch.tensor([query.tokens])).logits[0, query.first :]
        targets = torch.tensor(query.targets)
        log_probs = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
        found.append(Scored(log_probs.numpy(), (logits.argmax(-1) == targets).numpy()))
    return found


def scored(folder: pathlib.Path, *, share: bool = True, **how) -> tuple[list[Scored], Scorer]:
    c = open_checkpoint(str(folder))
    scorer = Scorer(c.cfg, load_params(c), **how)
    return [score for _, score in sorted(scorer.scores(queries(), share=share), key=lambda item: item[0])], scorer


def close(found: list[Scored], wanted: list[Scored]) -> bool:
    return all(np.allclose(a.log_probs, b.log_probs, atol=1e-4) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("budget", [16, 64, 1024])
def test_shared_beginnings_give_transformers_log_probabilities(folder, expected, budget):
    found, scorer = scored(folder, budget=budget)
    assert close(found, expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.greedy, b.greedy)
    if budget == 1024:
        assert scorer.counts.computed < 0.5 * scorer.counts.asked
        assert scorer.counts.asked == sum(len(query.tokens) for query in queries())


MESHES = {
    "1": MeshConfig(fsdp=1), "2 tensor": MeshConfig(fsdp=1, tensor=2), "4 data": MeshConfig(data=4, fsdp=1),
    "8 as in training": MeshConfig(data=2, fsdp=2, tensor=2), "8 with context": MeshConfig(fsdp=4, context=2),
}  # fmt: skip


@pytest.mark.parametrize("name", MESHES)
def test_rows_on_a_mesh_give_the_same(folder, expected, name):
    c = open_checkpoint(str(folder))
    mesh = make_mesh(MESHES[name], jax.devices()[: int(name[0])])
    scorer = Scorer(c.cfg, load_params(c, rules.parameter_shardings(c.cfg, mesh)), mesh=mesh, budget=64)
    found = [score for _, score in sorted(scorer.scores(queries()), key=lambda item: item[0])]
    assert close(found, expected)


def test_unshared_rows_give_the_same(folder, expected):
    found, scorer = scored(folder, share=False)
    assert close(found, expected)
    assert scorer.counts.computed == scorer.counts.asked


def test_a_row_without_its_limits_or_with_other_positions_is_seen(folder, expected, monkeypatch):
    """Negative controls of the comparison above."""
    with monkeypatch.context() as patch:
        patch.setattr(TrieRow, "limits", lambda row: np.full((len(row.attached),) * 2, len(row.tokens), np.int32))
        assert not close(scored(folder)[0], expected)
    real = TrieRow._append
    with monkeypatch.context() as patch:
        patch.setattr(TrieRow, "_append", lambda row, parent, token, at: real(row, parent, token, at + (at > 10)))
        assert not close(scored(folder)[0], expected)


def test_a_row_holds_each_common_token_once_and_no_more_than_the_budget():
    asked = queries()
    rows = pack_queries(asked, 64)
    assert sorted(number for row in rows for number in row.ask) == list(range(len(asked)))
    for row in rows:
        assert len(row.tokens) <= 80 or len(row.ask) == 1
        paths = set()
        for number in row.ask:
            paths |= {asked[number].tokens[: i + 1] for i in range(len(asked[number].tokens))}
        assert len(row.tokens) == len(paths)


def test_limits_let_a_chain_see_the_path_to_it_and_nothing_beside():
    row = TrieRow()
    row.add(0, Query((1, 2, 3, 4), (9,)))  # places 0 to 3
    row.add(1, Query((1, 2, 5, 6), (9,)))  # 4, 5 behind place 1
    row.add(2, Query((1, 2, 5, 7), (9,)))  # 6 behind place 4
    row.add(3, Query((8,), (9,)))  # 7, of its own
    assert row.chains == [0, 0, 0, 0, 1, 1, 2, 3]
    assert row.positions == [0, 1, 2, 3, 2, 3, 3, 0]
    assert row.limits().tolist() == [[8, -1, -1, -1], [1, 8, -1, -1], [1, 4, 8, -1], [-1, -1, -1, 8]]
