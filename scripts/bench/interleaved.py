"""Programs that take turns at the same work, each in its own process that stays alive between turns.

Two thread pools in one process interfere with each other, and programs that run one after the other find the machine
in different states. So each waits for its turn, the order is reversed every round, and medians count.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
IDLE = 0.05  # fraction of all CPUs that other processes may use when a turn begins


def serve(step: Callable[[int], float | dict[str, float]], profile: Callable[[], str], about: str = "") -> None:
    """Program side: takes a step or profiles one whenever a line on stdin says so, until stdin ends.

    Args:
      step: takes the step with the given number and returns its loss, or figures by name, once all of it is done.
      profile: takes one more step and reports where its time went.
      about: information about this process for the other side.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps libraries' prints out of the answers
    answers.write(json.dumps(about) + "\n")
    answers.flush()
    for taken, line in enumerate(sys.stdin):
        answer: Any
        if line.strip() == "profile":
            answer = profile()
        else:
            cpu, begin = time.process_time(), time.perf_counter()
            found = step(taken)
            answer = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
            answer |= found if isinstance(found, dict) else {"loss": found}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def busy() -> float:
    """Returns the CPU seconds that this machine has worked since boot; 0 if unavailable."""
    try:
        with open("/proc/stat") as f:
            user, nice, system, _, _, irq, softirq, steal = map(int, f.readline().split()[1:9])
    except OSError:  # not Linux
        return 0.0
    return (user + nice + system + irq + softirq + steal) / TICKS


def wait_until_idle(end: float) -> None:
    """Returns once other processes leave the CPUs idle for a second, at the latest at `end` of `time.monotonic()`."""
    while time.monotonic() < end:
        begin, before = time.monotonic(), busy()
        time.sleep(1)
        if busy() - before < IDLE * (time.monotonic() - begin) * (os.cpu_count() or 1):
            return


class Program:
    """One of the programs, in its process."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str]):
        self.name = name
        self.turns: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.about: str = json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}.")
        return line

    def _ask(self, what: str) -> Any:
        assert self._process.stdin
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer())

    def turn(self) -> dict[str, float]:
        """Takes one step; returns wall and CPU seconds, loss, and the share of the CPUs that others used meanwhile."""
        begin, before = time.perf_counter(), busy()
        measured = self._ask("step")
        spent = (time.perf_counter() - begin) * (os.cpu_count() or 1)
        measured["others"] = max(0.0, busy() - before - measured["cpu"]) / spent
        self.turns.append(measured)
        return measured

    def profile(self) -> str:
        return self._ask("profile")

    def median(self, key: str, rounds: list[int]) -> float:
        return statistics.median(self.turns[i][key] for i in rounds)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def alternate(programs: list[Program], warmup: int, repeats: int, patience: float) -> list[int]:
    """Runs rounds in which each program has its turn, in alternating order; prints every turn on a line.

    Args:
      programs: the programs.
      warmup: rounds that are not counted.
      repeats: rounds that are counted.
      patience: total seconds for which turns may wait for idle CPUs, and rounds that other processes disturbed may be
        repeated instead of counted.

    Returns:
      The indices in `turns` of the rounds that count.
    """
    end = time.monotonic() + patience
    counted: list[int] = []
    taken = 0
    while len(counted) < repeats:
        disturbed = False
        for program in programs[:: 1 if taken % 2 == 0 else -1]:
            wait_until_idle(end)
            t = program.turn()
            disturbed |= t["others"] > 2 * IDLE
            print(
                f"{taken + 1:>3} {program.name:<16} {t['wall']:7.3f} s  CPU {t['cpu']:6.2f} s  "
                f"others {100 * t['others']:3.0f} %"
                + "".join(f"  {key} {t[key]:.6f}" for key in t if key not in ("wall", "cpu", "others")),
                flush=True,
            )
        counts = taken >= warmup and not (disturbed and time.monotonic() < end)
        print(f"    {'counted' if counts else 'not counted: ' + ('warm-up' if taken < warmup else 'disturbed')}")
        if counts:
            counted.append(taken)
        taken += 1
    return counted


def loss_difference(one: Program, other: Program) -> float:
    """Returns the largest loss difference over all steps."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(one.turns, other.turns, strict=True))
