"""The reader of compiled TPU programs, on a program written by hand."""

import pytest

from solar_jax.hardware.chips import CHIPS
from solar_jax.planning import hlo_cost
from solar_jax.planning.hlo_cost import read_program

# A loop of 3 turns. A chip gathers 4 x 8 bfloat16 in two halves of one asynchronous operation, scatters a sum that the
# compiler writes as an all-reduce, and adds up 16 float32; its matmul takes 1000 cycles.
PROGRAM = """HloModule step

%started (p: bf16[1,8]) -> (bf16[1,8], bf16[4,8]) {
  %all-gather.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
}

%finished (p: bf16[1,8]) -> bf16[4,8] {
  %all-gather.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
}

%all-reduce-scatter.1 (p: bf16[4,8]) -> bf16[1,8] {
  %all-reduce.1 = bf16[4,8]{1,0} all-reduce(%p), channel_id=2
}

%body (p: s32[]) -> s32[] {
  %async-collective-start = (bf16[1,8], bf16[4,8]) fusion(%a), kind=kCustom, calls=%started
  %dot = f32[4,4]{1,0} fusion(%b), kind=kOutput, calls=%x, backend_config={"estimated_cycles":"1000"}
  %async-collective-done = bf16[4,8] fusion(%a), kind=kCustom, calls=%finished
  %scattered = bf16[1,8] fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce.2 = f32[16]{0} all-reduce(%d), channel_id=3
}

%condition (p: s32[]) -> pred[] {
  %constant.1 = s32[] constant(3)
}

ENTRY %main (p: s32[]) -> s32[] {
  %while.1 = s32[] while(%p), condition=%condition, body=%body
  %send.1 = (f32[16]{0}, u32[], token[]) send(%g, %t), TO_OTHER_SLICES
  %recv.1 = (f32[16]{0}, u32[], token[]) recv(%t), TO_OTHER_SLICES
}
""".replace(
    "TO_OTHER_SLICES",
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}',
)


@pytest.fixture(scope="module")
def program() -> hlo_cost.Program:
    return read_program(PROGRAM, CHIPS["v5p"])


def test_a_loop_counts_as_often_as_it_turns(program):
    assert program.cycles == 3 * 1000
    assert program.parts()["compute"] == pytest.approx(3000 / 1.75e9)


def test_each_collective_counts_once_and_an_all_reduce_twice(program):
    gathered, scattered, added = 3 * 4 * 8 * 2, 3 * 4 * 8 * 2, 3 * 16 * 4
    assert dict(program.moved) == {"all-gather": gathered, "reduce-scatter": scattered, "all-reduce": 2 * added}


# The same gather on a SparseCore.
SPARSE = PROGRAM.replace(
    "  %async-collective-start = (bf16[1,8], bf16[4,8]) fusion(%a), kind=kCustom, calls=%started",
    """  %g.call-start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), to_apply=%started
  %g.call-update = ((bf16[1,8]), bf16[4,8]) call-update(%g.call-start, %a)""",
).replace(
    "  %async-collective-done = bf16[4,8] fusion(%a), kind=kCustom, calls=%finished",
    "  %g.call-done = bf16[4,8] call-done(%g.call-update)",
)


def test_collectives_that_others_run_beside_are_told_from_those_that_they_wait_for(program):
    sparse = read_program(SPARSE, CHIPS["v5p"])
    assert sparse.moved == program.moved
    assert sparse.asynchronous == program.asynchronous == 3 * 4 * 8 * 2
    waiting = read_program(PROGRAM.replace("%async-collective-start", "%fusion.1"), CHIPS["v5p"])
    assert waiting.moved == program.moved
    assert waiting.asynchronous == 0
    assert "; 0.0 GB of it asynchronously" in waiting.report(1, 1)


@pytest.mark.parametrize("text", [PROGRAM, SPARSE], ids=["fused", "sparse"])
def test_the_schedule_waits_for_what_is_not_done_when_it_is_needed(text):
    chip = CHIPS["v5p"]
    matmul, others = 1000 / chip.clock, (64 + 2 * 64) / chip.links  # the scattered sum and the all-reduce
    network = 64 / chip.network
    short = read_program(text, chip).scheduled_seconds()
    assert short == pytest.approx(3 * (matmul + others) + network, rel=1e-9)
    long = text.replace("bf16[4,8]{1,0} all-gather", "bf16[4000,8000]{1,0} all-gather")
    gather = 4000 * 8000 * 2 / chip.links
    assert gather > 2 * matmul
    assert read_program(long, chip).scheduled_seconds() == pytest.approx(3 * (gather + others) + network, rel=1e-9)
    serial = read_program(long, chip).seconds()[1]
    assert serial == pytest.approx(3 * (matmul + gather + others) + network, rel=1e-9)


def test_an_operation_without_an_estimate_takes_no_cycles():
    unknown = PROGRAM.replace('"estimated_cycles":"1000"', f'"estimated_cycles":"{2**63 - 1}"')
    assert read_program(unknown, CHIPS["v5p"]).cycles == 0


def test_a_reduce_scatter_counts_its_operand_wherever_the_type_of_that_stands():
    text = """HloModule step

ENTRY %main (p: bf16[32,8]) -> bf16[2,8] {
  %p = bf16[32,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %r = bf16[2,8]{1,0:T(8,128)(2,1)} reduce-scatter(OPERAND), channel_id=1, dimensions={0}
}
"""
    for operand in ("%p", "bf16[32,8]{1,0:T(8,128)(2,1)} %p"):
        found = read_program(text.replace("OPERAND", operand), CHIPS["v5p"])
        assert dict(found.moved) == {"reduce-scatter": 32 * 8 * 2}, operand


def test_what_crosses_slices_is_neither_hidden_nor_taken_for_traffic_within_one(program):
    assert program.network == 16 * 4  # of a sum over two each sends its own once
    four = PROGRAM.replace('target="{1,2}x', 'target="{1:4}x')
    assert read_program(four, CHIPS["v5p"]).network == 16 * 4 * 2 * 3 / 4
    alone = read_program(PROGRAM.replace("send(", "bitcast("), CHIPS["v5p"])
    added = 64 / CHIPS["v5p"].network
    assert program.seconds() == pytest.approx([s + added for s in alone.seconds()], rel=1e-9)
    assert "to other slices" in program.report(1, 1)
    assert "to other slices" not in alone.report(1, 1)


KERNEL = """HloModule step

ENTRY %main (p: s32[]) -> s32[] {
  %splash_mha_fwd.1 = bf16[4,512,128] custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", SHAPES
}
""".replace("SHAPES", "operand_layout_constraints={bf16[4,512,128], bf16[2,1024,128], bf16[2,1024,128]}")


def test_queries_of_a_split_row_are_counted_against_all_its_keys():
    # 4 heads x 512 queries x 1024 keys x 128, two products of 2 FLOPs, half of them masked
    assert read_program(KERNEL, CHIPS["v5p"]).kernel_flops == 4 * 512 * 1024 * 128 * 2


@pytest.mark.parametrize(("results", "units"), [(2, 2.0), (3, 2.5)])
def test_a_backward_kernel_that_also_gives_dq_is_counted_as_fused_whatever_its_name(results, units):
    # splash names both ways alike
    arrays = ", ".join(["bf16[16,4,512,128]", "bf16[2,1024,128]", "bf16[2,1024,128]"][-results:])
    backward = KERNEL.replace("splash_mha_fwd.1 = bf16[4,512,128]", f"splash_mha_dkv_no_residuals.1 = ({arrays})")
    assert read_program(backward, CHIPS["v5p"]).kernel_flops == units * 4 * 512 * 1024 * 128 * 2


def test_a_float32_kernel_is_counted_by_its_own_arrays_and_six_times():
    wide = KERNEL.replace("bf16[", "f32[")
    assert read_program(wide, CHIPS["v5p"]).kernel_flops == 6 * 4 * 512 * 1024 * 128 * 2
    angles = KERNEL.replace("constraints={", "constraints={f32[8,1024,128], ")  # of a bfloat16 kernel
    assert read_program(angles, CHIPS["v5p"]).kernel_flops == 4 * 512 * 1024 * 128 * 2


GROUPED = """HloModule step

ENTRY %main (p: s32[]) -> s32[] {
  %ragged-dot-metadata = (s32[3]) custom-call(%n), custom_call_target="tpu_custom_call", LAID_OUT={s32[2]{0}}
  %ragged-dot-none = RESULT custom-call(%n), custom_call_target="tpu_custom_call", LAID_OUT={OPERANDS}, metadata={}
}
""".replace("LAID_OUT", "operand_layout_constraints")


@pytest.mark.parametrize(
    ("result", "operands"),
    [
        ("bf16[64,32]", "bf16[64,16]{1,0}, bf16[2,16,32]{2,1,0}"),  # forward
        ("bf16[64,16]", "bf16[64,32]{1,0}, bf16[2,32,16]{2,1,0}"),  # gradient of the rows
        ("bf16[2,16,32]", "bf16[64,16]{1,0}, bf16[64,32]{1,0}"),  # gradient of the weights
    ],
)
def test_a_grouped_matmul_costs_its_rows_once_whatever_the_experts(result, operands):
    found = read_program(GROUPED.replace("RESULT", result).replace("OPERANDS", operands), CHIPS["v5p"])
    assert found.grouped_flops == 2 * 64 * 16 * 32
    assert not found.unknown
    assert found.parts()["grouped"] == pytest.approx(2 * 64 * 16 * 32 / (0.98 * 459e12))
