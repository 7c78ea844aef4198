"""Estimates a step's time from HLO text that the TPU compiler has optimised: a model for comparing programs.

The compiler annotates each operation with its estimated cycles. The sums below count each operation as often as the
loops around it run:

  compute  those cycles, at the chip's clock
  kernels  attention kernels, which have none: their FLOPs, half of them masked, at half of the chip's peak
  grouped  matmuls of experts, kernels of XLA's own without cycles: their FLOPs, at the rate of plain matmuls
  comm     bytes of collectives over ICI on all axes; an all-reduce moves its bytes twice, unless it implements a
           reduce-scatter: the compiler names that fusion of an all-reduce and a slice "all-reduce-scatter"
  host     bytes copied to and from host memory, at 16 GB/s
  network  bytes to other slices, over a chip's share of its host's DCN bandwidth; the compiler writes them as sends

"overlapped" assumes that compute + kernels + grouped, comm and host run concurrently, "serial" one after the other. In
between lies "scheduled", which follows the order of operations in the program: collectives that it starts and awaits in
operations of their own run beside those in between, one at a time; all others wait for each other.
DCN time is added to both: slices exchange the sum of their gradients, which is ready after the last layer and needed
next.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

from solar_jax.hardware.chips import Chip

HOST = 1.6e10  # bytes/s
KERNEL_RATE = 0.5  # fraction of the peak that attention kernels are assumed to reach
FLOAT32_PASSES = 6  # bfloat16 matmuls that a TPU runs for one in float32 (`Precision.HIGHEST`)
# Forward FLOPs are 2 matmuls of [T, H] x [H, T], half of them masked; kernels of a backward pass in units of that.
KERNELS = ((r"fwd", 1.0), (r"dkv.*fused|fused.*dkv", 2.5), (r"dq", 1.5), (r"", 2.0))

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_WIDTHS |= {"f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b(" + "|".join(_WIDTHS) + r")\[([0-9,]*)\]")
_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCH = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)")
_CALL = re.compile(r" (?:call|call-start|async-start)\(.*(?:to_apply|calls|called_computations)=\{?%?([\w.\-]+)")
_ASYNC = re.compile(
    r"%([\w.\-]+) = .* (?:call|async|all-gather|all-reduce|collective-permute)-(start|update|done)\((?:%([\w.\-]+))?"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_STARTED = re.compile(r" (?:call|async)-start\(|%async-collective-start[\w.\-]* =")
_DONE = re.compile(r"%async-collective-done[\w.\-]* =")
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_CYCLES = re.compile(r'estimated_cycles":"(\d+)"')
_SEND = re.compile(r"= \((.*?)\) send\(.*xla_megascale_runtime")
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')
_HOST_COPY = re.compile(r" (copy-start|copy|dynamic-update-slice|dynamic-slice)\(")


def _arrays(text: str) -> list[tuple[str, list[int]]]:
    """Returns the (type, shape) of every array in `text`."""
    return [(t, [int(d) for d in dims.split(",") if d]) for t, dims in _ARRAY.findall(text)]


def _bytes(text: str) -> list[int]:
    return [math.prod(shape) * _WIDTHS[t] for t, shape in _arrays(text)]


@dataclasses.dataclass
class Program:
    """Work of one step on one chip."""

    chip: Chip
    cycles: float = 0.0
    kernel_flops: float = 0.0
    grouped_flops: float = 0.0
    moved: Counter[str] = dataclasses.field(default_factory=Counter)  # bytes by kind of collective
    asynchronous: float = 0.0  # bytes of those that other operations run beside
    scheduled: float = 0.0  # seconds in the order of the program, without network
    host: float = 0.0  # bytes
    network: float = 0.0  # bytes
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)  # number of times that each runs
    unknown: set[str] = dataclasses.field(default_factory=set)  # kernels without a known cost

    def parts(self) -> dict[str, float]:
        """Returns the seconds of each part."""
        return {
            "compute": self.cycles / self.chip.clock,
            "kernels": self.kernel_flops / (KERNEL_RATE * self.chip.peak),
            "grouped": self.grouped_flops / (self.chip.matmul_rate * self.chip.peak),
            "comm": sum(self.moved.values()) / self.chip.links,
            "host": self.host / HOST,
            "network": self.network / self.chip.network,
        }

    def seconds(self) -> tuple[float, float]:
        """Returns the (overlapped, serial) step time."""
        p = self.parts()
        return max(p["compute"] + p["kernels"] + p["grouped"], p["comm"], p["host"]) + p["network"], sum(p.values())

    def scheduled_seconds(self) -> float:
        """Returns the step time in the order of the program."""
        return self.scheduled + self.parts()["network"]

    def report(self, tokens: float, flops: float) -> str:
        """Formats a report; `tokens` and model `flops` are per chip and step."""
        lines = [f"kernels without a cost, so not comparable: {', '.join(self.unknown)}"] if self.unknown else []
        lines.append("parts " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.parts().items()))
        moved = self.moved | ({"to other slices": self.network} if self.network else {})
        kinds = ", ".join(f"{kind} {count / 1e9:.1f} GB" for kind, count in moved.items())
        lines.append(f"moved {kinds}; {self.asynchronous / 1e9:.1f} GB of it asynchronously")
        overlapped, serial = self.seconds()
        times = {"overlapped": overlapped, "scheduled": self.scheduled_seconds(), "serial": serial}
        for name, seconds in times.items():
            mfu = 100 * flops / seconds / self.chip.peak
            lines.append(f"{name:10} step {seconds:.3f} s, {tokens / seconds:,.0f} tokens/s a chip, MFU {mfu:.1f} %")
        return "\n".join(lines)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the entry computation."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = None if line.startswith(" ") else re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head:
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif line.rstrip() == "}":
            name = ""
        elif name:
            found[name].append(line)
    return {name: _with_operands(lines) for name, lines in found.items()}, entry


def _with_operands(lines: list[str]) -> list[str]:
    """Writes the types of operands into reduce-scatters, whose own type is that of the smaller result."""
    if not any(" reduce-scatter(%" in line for line in lines):
        return lines
    types = {found[1]: found[2] for line in lines if (found := re.search(r"%([\w.\-]+) = (\w+\[[\d,]*\])", line))}

    def typed(found: re.Match[str]) -> str:
        names = re.findall(r"%([\w.\-]+)", found[1])
        return " reduce-scatter(" + ", ".join(f"{types.get(name, '')} %{name}" for name in names) + ")"

    return [re.sub(r" reduce-scatter\((%[^)]*)\)", typed, line) for line in lines]


def _executed(
    computations: dict[str, list[str]], name: str, times: int, asynchronous: bool = False
) -> Iterator[tuple[str, int, str, bool]]:
    """Yields (operation, how often it runs, the enclosing computation, whether that is asynchronous)."""
    for line in computations[name]:
        if loop := _WHILE.search(line):
            yield from _executed(computations, loop[2], times * _turns(computations, loop[1]), asynchronous)
            continue
        for branch in _BRANCH.findall(line):
            yield from _executed(computations, branch, times, asynchronous)
        yield line, times, name, asynchronous
        if _DONE.search(line):  # its start has been counted, and both contain the collective
            continue
        for called in _called(line):
            if called in computations:
                yield from _executed(computations, called, times, asynchronous or bool(_STARTED.search(line)))


def _turns(computations: dict[str, list[str]], condition: str) -> int:
    """Returns how often a loop runs: the largest number in its condition."""
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations.get(condition, [])))
    return max(map(int, limits), default=1)


def _called(line: str) -> list[str]:
    """Returns the computations that an operation calls and that may hold what has no estimate of its own."""
    inner = _FUSED.search(line) if " fusion(" in line and "kCustom" in line and not _CYCLES.search(line) else None
    return [found[1] for found in (inner, _CALL.search(line)) if found]


def _cycles(line: str) -> int:
    """Returns an operation's estimated cycles; 0 without an estimate, as for those of a SparseCore."""
    found = _CYCLES.search(line)
    return int(found[1]) if found and int(found[1]) < 2**62 else 0


def _kernel(program: Program, line: str, times: int) -> None:
    """Adds an attention kernel's FLOPs, from the largest of its operands: [..., T, H], leading axes rows and heads."""
    found = re.search(r"%([\w\-]+)", line)
    name = found[1] if found else "?"
    if re.match("ragged-dot|gmm|tgmm", name):
        _grouped(program, line, times)
        return
    if not re.search("splash|flash|attention", name):
        program.unknown.add(name)
        return
    operands = line.split("operand_layout_constraints")[-1]
    arrays = [(t, shape) for t, shape in _arrays(operands) if len(shape) >= 3]  # a single row has no axis
    wide = not any(t == "bf16" for t, _ in arrays)  # queries and keys are float32, as angles and sums always are
    shapes = [shape for t, shape in arrays if t == ("f32" if wide else "bf16")]
    *rows, length, width = max(shapes, key=lambda s: math.prod(s[:-2]))
    keys = max(s[-2] for s in shapes)  # more than queries if a row is sharded over chips
    results = [shape for _, shape in _arrays(line.split(" custom-call(")[0]) if len(shape) >= 3]
    fused = "_fused" if "dkv" in name and len(results) >= 3 else ""  # dq too, whatever its name says
    factor = next(f for pattern, f in KERNELS if re.search(pattern, name + fused))
    passes = FLOAT32_PASSES if wide else 1
    program.kernel_flops += passes * times * factor * 2 * math.prod(rows) * length * keys * width
    program.kernels[name] += times


def _grouped(program: Program, line: str, times: int) -> None:
    """Adds a grouped matmul's FLOPs, 2 M K N: of [M, K] x [E, K, N], or of its weights' gradient, [M, K] x [M, N]."""
    shapes = [shape for _, shape in _arrays(line.split("operand_layout_constraints")[-1].split("metadata")[0])]
    rows = [shape for shape in shapes if len(shape) == 2]
    if not rows:  # the kernel that lays out the groups
        return
    weights = [shape for shape in shapes if len(shape) == 3]
    M, K = rows[0]
    N = math.prod(weights[0][1:]) // K if weights else rows[1][1]
    program.grouped_flops += times * 2 * M * K * N


def _collective(program: Program, line: str, times: int, where: str, asynchronous: bool) -> None:
    found = _COLLECTIVE.search(line)
    if not found:
        return
    kind, sizes = found[2], _bytes(found[1])
    size = max(sizes) if kind == "all-gather" and found[3] else sum(sizes)
    if kind == "reduce-scatter":  # its operands, not its smaller result
        size = sum(_bytes(line.split(" reduce-scatter(", 1)[1].split("channel_id")[0])) or size
    if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    total = size * times * (2 if kind == "all-reduce" else 1)
    program.moved[kind] += total
    program.asynchronous += total if asynchronous or found[3] else 0


def _network(program: Program, line: str, times: int) -> None:
    """Adds the bytes a chip sends to other slices: 2 (n - 1) / n of a sum over n slices, as in any all-reduce."""
    found = _SEND.search(line)
    if not found:
        return
    target = _SLICES.search(line)
    parts = [list(map(int, part.split(":"))) for part in target[1].split(",")] if target else [[0, 1]]
    slices = sum(part[-1] - part[0] + 1 for part in parts)
    ways = 2 * (slices - 1) / slices if 'transfer_type="ALL_REDUCE"' in line else slices - 1
    program.network += times * ways * _bytes(found[1])[0]


def read_program(text: str, chip: Chip) -> Program:
    """Parses optimised HLO text into the program that one device of `chip` runs."""
    computations, entry = _computations(text)
    program = Program(chip)
    for line, times, where, asynchronous in _executed(computations, entry, 1):
        program.cycles += times * _cycles(line)
        if 'custom_call_target="tpu_custom_call"' in line:
            _kernel(program, line, times)
        _collective(program, line, times, where, asynchronous)
        _network(program, line, times)
        if "S(5)" in line and _HOST_COPY.search(line):  # memory space 5 is the host's
            program.host += times * max(_bytes(line.split("=", 1)[1].split("(", 1)[0]), default=0)
    program.scheduled = _scheduled(computations, entry, chip)
    return program


def _scheduled(computations: dict[str, list[str]], name: str, chip: Chip) -> float:
    """Returns the seconds of one run of a computation, its operations in order, without host and other slices."""
    now = free = 0.0  # when the next operation starts, and when the next asynchronous collective can
    seconds: dict[str, float] = {}  # name or channel of an asynchronous collective -> how long it takes
    ready: dict[str, float] = {}  # the same -> when it is done

    def start(key: str, operation: str) -> None:
        nonlocal free
        free = ready[key] = max(now, free) + seconds[operation]

    for line in computations[name]:
        if loop := _WHILE.search(line):
            now += _turns(computations, loop[1]) * _scheduled(computations, loop[2], chip)
            continue
        now += sum(_scheduled(computations, branch, chip) for branch in _BRANCH.findall(line))
        called = [c for c in _called(line) if c in computations]
        fused = [op for c in called for op in computations[c]]
        if step := _ASYNC.search(line):
            operation, what, operand = step.groups()
            if what == "start":
                seconds[operation] = sum(_alone(op, c, chip)[1] for c in called for op in computations[c])
                seconds[operation] += _alone(line, name, chip)[1]
            if what == "update":
                seconds[operation] = seconds.get(operand, 0.0)  # 0 if begun in another computation
            if what == "done":
                now = max(now, ready.get(operand, now))
            elif operand:  # without operands it begins later, with its update
                start(operation, operation)
            continue
        channel = next((found[1] for op in fused if (found := _CHANNEL.search(op))), "")
        if _STARTED.search(line):
            seconds[channel] = sum(_alone(op, c, chip)[1] for c in called for op in computations[c])
            start(channel, channel)
        elif _DONE.search(line):
            now = max(now, ready.get(channel, now))
        else:
            now += sum(_scheduled(computations, c, chip) for c in called)
            now += sum(_alone(line, name, chip))
    return now


def _alone(line: str, where: str, chip: Chip) -> tuple[float, float]:
    """Returns an operation's own seconds: of computing, and of moving bytes within the slice."""
    one = Program(chip, float(_cycles(line)))
    if 'custom_call_target="tpu_custom_call"' in line:
        _kernel(one, line, 1)
    _collective(one, line, 1, where, asynchronous=False)
    parts = one.parts()
    return parts["compute"] + parts["kernels"] + parts["grouped"], parts["comm"]
