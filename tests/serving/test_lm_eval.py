"""lm-eval's local-completions, asked over the wire, gives what its in-process class gives."""

import dataclasses

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from solar_jax.evaluation.harness import SolarModel
from tests.serving.servers import load_alone, running, save_writer

pytestmark = pytest.mark.slow  # lm-eval imports for ten seconds
PAIRS = [
    ("The sky is", " blue"), ("The sky is", " green and wide"), ("Q: one\nA:", " two"), ("Straße", " naïve 日本"),
    ("a" * 90, "b" * 40), ("x", "y"),
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = save_writer(tmp_path_factory.mktemp("wire") / "model")
    model = load_alone(folder)
    with running(model, rows=4) as server:
        theirs = LocalCompletionsAPI(
            base_url=f"{server.url}/completions", model="tiny", tokenizer=str(folder), max_length=1024, batch_size=4,
            tokenizer_backend="huggingface",
        )  # fmt: skip
        yield SolarModel(dataclasses.replace(model)), theirs


def asked(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_log_likelihoods_over_the_wire_are_those_in_process_and_so_is_what_is_greedy(both):
    likely = both[0].generate_until(asked("generate_until", [("Once", {"until": [], "max_gen_toks": 6})]))[0]
    pairs = [*PAIRS, ("Once", likely), ("Once", likely[:-1] + "#")]
    wanted, found = (model.loglikelihood(asked("loglikelihood", pairs)) for model in both)
    assert [a for a, _ in found] == pytest.approx([b for b, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [greedy for _, greedy in found][-2:] == [True, False]


def test_another_model_is_seen(both, tmp_path):
    """A negative control of the comparison above."""
    other = SolarModel(load_alone(save_writer(tmp_path / "other", seed=1)))
    wanted, found = (model.loglikelihood(asked("loglikelihood", PAIRS[:2])) for model in (other, both[1]))
    assert all(abs(a - b) > 1e-2 for (a, _), (b, _) in zip(found, wanted, strict=True))


def test_generated_strings_over_the_wire_are_those_in_process(both):
    contexts = ["Once upon", "a" * 60, "Q: one\nA:"]
    requests = [(text, {"until": ["\n\n", "e"], "max_gen_toks": 12, "do_sample": False}) for text in contexts]
    wanted, found = (model.generate_until(asked("generate_until", requests)) for model in both)
    assert found == wanted
