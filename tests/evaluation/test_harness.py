"""lm-eval asks our class and its own Hugging Face class the same things and gets the same answers."""

import json
import pathlib

import pytest
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from solar_jax.evaluation.harness import SolarModel
from tests.conftest import hf_model, save_hf

pytestmark = pytest.mark.slow  # lm-eval imports for ten seconds
# A tokenizer that puts BOS in front, one that does not, and a short context.
FOLDERS = {"plain": {}, "bos": {}, "short": {"max_position_embeddings": 48}}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory) -> pathlib.Path:
    folder = save_hf(hf_model(**FOLDERS[request.param]), tmp_path_factory.mktemp("harness") / request.param)
    if request.param == "bos":
        content = json.loads((folder / "tokenizer.json").read_text())
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def pair(folder) -> tuple[SolarModel, HFLM]:
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return SolarModel(str(folder)), theirs


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [
    ("The sky is", " blue"), ("The sky is", " green"), ("The sky is ", "blue"), ("", "alone"), ("", "<s>begins"),
    ("<s>The sky", " is"), ("a" * 60, "b" * 20), ("Q: one\nA:", " two"), ("Q: one\nA:", " three"), ("x", "y" * 70),
    ("The sky is   ", "  far"), ("Straße", " naïve 日本"),
]  # fmt: skip


def test_log_likelihoods_are_lm_evals(pair):
    usable = [args for args in PAIRS if len(args[1]) <= pair[0].max_length]
    found, wanted = (model.loglikelihood(asked("loglikelihood", *usable)) for model in pair)
    for args, (a, greedy), (b, greedy_too) in zip(usable, found, wanted, strict=True):
        assert a == pytest.approx(b, abs=1e-3), args
        assert greedy == greedy_too


def test_sharing_changes_nothing(folder, pair):
    shared, alone = (SolarModel(pair[0].loaded, share=share) for share in (True, False))
    usable = [args for args in PAIRS if len(args[1]) <= alone.max_length]
    found, wanted = (model.loglikelihood(asked("loglikelihood", *usable)) for model in (shared, alone))
    assert [a for a, _ in found] == pytest.approx([b for b, _ in wanted], abs=1e-4)
    assert shared.scorer.counts.computed < alone.scorer.counts.computed == alone.scorer.counts.asked


def test_another_setting_of_bos_is_seen(folder, pair):
    """A negative control, where the tokenizer has a BOS to leave out."""
    other = SolarModel(pair[0].loaded, add_bos_token=False)
    found, wanted = (model.loglikelihood(asked("loglikelihood", PAIRS[0])) for model in (other, pair[1]))
    assert (abs(found[0][0] - wanted[0][0]) > 1e-2) == (folder.name == "bos")


def test_rolling_log_likelihoods_are_lm_evals_over_several_windows(pair):
    texts = [("A text. " * 30,), ("",), ("short",), ("<s>begins",)]
    found, wanted = (model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for model in pair)
    assert found == pytest.approx(wanted, abs=1e-2)


@pytest.mark.parametrize("until", [["\n\n"], [], ["a", "zz"], ["e"]])
def test_generated_strings_are_lm_evals(pair, until):
    contexts = ["Once upon", "a" * 60, "Q: one\nA:", "x"]
    requests = [(text, {"until": until, "max_gen_toks": 16, "do_sample": False}) for text in contexts]
    found, wanted = (model.generate_until(asked("generate_until", *requests)) for model in pair)
    assert found == wanted


def test_chats_are_written_as_lm_eval_writes_them(folder, tmp_path):
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    ours = SolarModel(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    for generates in (True, False):
        wanted = tokenizer.apply_chat_template(
            history, tokenize=False, add_generation_prompt=generates, continue_final_message=not generates
        )
        assert ours.apply_chat_template(history, generates) == wanted
    (folder / "chat_template.jinja").unlink()
