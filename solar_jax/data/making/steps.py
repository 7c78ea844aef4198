"""Steps from a seed question to its outcomes: rephrase, look, answer, look."""

import dataclasses
import hashlib
from typing import Any

from solar_jax.data.making.endpoint import Endpoint, Reply, Unanswered
from solar_jax.data.making.filters import (
    ANSWER_CHECKS,
    QUESTION_CHECKS,
    Dropped,
    contaminated,
    first_failure,
    incomplete,
)
from solar_jax.data.making.prompts import answer_messages, rephrase_messages, said_answer, said_question
from solar_jax.data.making.records import PAIRED
from solar_jax.data.making.seeds import Seed
from solar_jax.data.prepared.decontamination import Index


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked; every field decides the texts."""

    kind: str
    model: str
    temperature: float
    max_new_tokens: int
    rephrasings: int
    seed: int


@dataclasses.dataclass
class Outcome:
    """One rephrasing, to be kept if it has no reason to be dropped."""

    rephrasing: int
    question: str = ""
    answer: str = ""
    model: str = ""
    reason: str = ""
    details: str = ""
    evaluation: str = ""

    def drop(self, dropped: Dropped | None) -> bool:
        """Notes a reason; returns whether there was one."""
        if dropped:
            self.reason, self.details, self.evaluation = dropped.reason, dropped.details, dropped.evaluation
        return dropped is not None


@dataclasses.dataclass
class Finished:
    """A seed question with its outcomes and what they took, a line of progress.jsonl."""

    record: int
    outcomes: list[Outcome]
    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    date: str = ""  # when it was finished; not in train.jsonl, which is the same whenever it is made


def ask_about(seed: Seed, asking: Asking, endpoint: Endpoint, index: Index | None) -> Finished:
    """Asks for all rephrasings of a question, one after another.

    Raises:
      Unanswered: a request got no answer, and may get one later.
      UserError: no other request would be answered either.
    """
    finished = Finished(seed.record, [])

    def ask(messages: list[dict[str, Any]], rephrasing: int, step: str) -> Reply:
        finished.requests += 1
        reply = endpoint.chat({
            "model": asking.model, "messages": messages, "temperature": asking.temperature,
            "max_tokens": asking.max_new_tokens, "seed": request_seed(asking.seed, seed.record, rephrasing, step),
        })  # fmt: skip
        finished.retries += reply.retries
        finished.tokens_in += reply.tokens_in
        finished.tokens_out += reply.tokens_out
        return reply

    for k in range(asking.rephrasings):
        outcome = Outcome(k)
        finished.outcomes.append(outcome)
        try:
            reply = ask(rephrase_messages(seed.question, k), k, "question")
            outcome.question, outcome.model = said_question(reply.text), reply.model
            if (
                outcome.drop(incomplete(reply, outcome.question, "the rephrased question"))
                or outcome.drop(first_failure(QUESTION_CHECKS, seed, outcome.question))
                or outcome.drop(contaminated(index, "", outcome.question))
            ):
                continue
            reply = ask(answer_messages(outcome.question), k, "answer")
            outcome.answer, outcome.model = said_answer(reply.text), reply.model
            if not outcome.drop(incomplete(reply, outcome.answer, "the answer")):
                outcome.drop(_failure_of_answer(seed, outcome, asking.kind, index))
        except Unanswered as e:
            if not e.refused:
                raise
            outcome.drop(Dropped("refused", str(e)))
    return finished


def _failure_of_answer(seed: Seed, outcome: Outcome, kind: str, index: Index | None) -> Dropped | None:
    if failure := first_failure(ANSWER_CHECKS, seed, outcome.answer):
        return failure
    if kind == PAIRED and outcome.answer == seed.answer:
        return Dropped("same_answer", "word for word")
    return contaminated(index, "", f"{outcome.question}\n\n{outcome.answer}")


def request_seed(seed: int, record: int, rephrasing: int, step: str) -> int:
    """Derives the seed of one request, so that it depends neither on order nor on what was asked before."""
    digest = hashlib.sha256(f"{seed} {record} {rephrasing} {step}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # 31 bits, which every server takes
