"""What is read from a compiled program's text, on a made-up one."""

import pytest

from addp_jax.planning import hlo

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%s"}}'
TEXT = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%slice_of_stack (param_0: bf16[4,8,128], param_1: s32[]) -> bf16[8,128] {
  %param_0 = bf16[4,8,128]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  ROOT %dynamic-slice.1 = bf16[1,8,128]{2,1,0} dynamic-slice(%param_0, %param_1, %param_1, %param_1), dynamic_slice_sizes={1,8,128}
}

%into_stack (param_0: f32[4,8], param_1: f32[1,8], param_2: s32[]) -> f32[4,8] {
  %param_0.1 = f32[4,8]{1,0} parameter(0)
  %param_1.1 = f32[1,8]{1,0} parameter(1)
  %param_2.1 = s32[] parameter(2)
  ROOT %dynamic-update-slice.1 = f32[4,8]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1, %param_2.1)
}

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0} parameter(0)
  %all-reduce.5 = bf16[64,128]{1,0} all-reduce(%input), channel_id=5, to_apply=%sum
  ROOT %dynamic-slice.2 = bf16[16,128]{1,0} dynamic-slice(%all-reduce.5), dynamic_slice_sizes={16,128}
}

%body (state: (s32[], bf16[4,8,128], f32[4,8])) -> (s32[], bf16[4,8,128], f32[4,8]) {
  %state = (s32[], bf16[4,8,128]{2,1,0}, f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = bf16[4,8,128]{2,1,0} get-tuple-element(%state), index=1
  %sums = f32[4,8]{1,0} get-tuple-element(%state), index=2
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%stack, %i), kind=kLoop, calls=%slice_of_stack, CYCLES_100
  %all-gather.1 = bf16[32,128]{1,0} all-gather(%fusion.1), channel_id=1, dimensions={0}
  %all-gather.2 = bf16[32,128]{1,0} all-gather(%fusion.1), channel_id=1, dimensions={0}
  %row = f32[1,8]{1,0:T(1,128)S(1)} constant({...})
  %fusion.2 = f32[4,8]{1,0} fusion(%sums, %row, %i), kind=kLoop, calls=%into_stack, CYCLES_9223372036854775807
  ROOT %tuple.1 = (s32[], bf16[4,8,128]{2,1,0}, f32[4,8]{1,0}) tuple(%i, %stack, %fusion.2)
}

%condition (state.1: (s32[], bf16[4,8,128], f32[4,8])) -> pred[] {
  %state.1 = (s32[], bf16[4,8,128]{2,1,0}, f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %constant.1 = s32[]{:T(128)} constant(4)
  ROOT %compare.1 = pred[] compare(%i.1, %constant.1), direction=LT
}

ENTRY %main (p: bf16[64,128]) -> bf16[16,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %start = (s32[], bf16[4,8,128]{2,1,0}, /*index=2*/f32[4,8]{1,0}) custom-call(%p), custom_call_target="Start"
  %while.1 = (s32[], bf16[4,8,128]{2,1,0}, f32[4,8]{1,0}) while(%start), condition=%condition, body=%body
  %copy.1 = bf16[64,128]{0,1} copy(%p), CYCLES_7
  %all-reduce-start.1 = (f32[10]{0}, f32[2]{0}) all-reduce-start(%copy.1), channel_id=3, to_apply=%sum
  ROOT %scattered = bf16[16,128]{1,0} fusion(%copy.1), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
for number in ("100", "9223372036854775807", "7"):
    TEXT = TEXT.replace(f"CYCLES_{number}", CYCLES % number)


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    found = hlo.collectives(TEXT)
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"] == hlo.Collective(4, 4 * 32 * 128 * 2)  # two clones of one channel
    assert found["all-reduce"] == hlo.Collective(1, 4 * (10 + 2))
    assert found["reduce-scatter"] == hlo.Collective(1, 64 * 128 * 2)


def test_how_often_a_loop_runs_is_what_the_compiler_says_where_it_does():
    told = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert hlo.collectives(told)["all-gather"].count == 5


def test_estimated_cycles_in_a_loop_count_as_often_as_it_runs_and_unknown_ones_do_not():
    assert hlo.estimated_cycles(TEXT) == 4 * 100 + 7


def test_main_memory_traffic_counts_slices_of_stacks_and_not_what_stays_in_fast_memory():
    each_layer = 8 * 128 * 2 + 2 * 32 * 128 * 2 + 8 * 4  # slice read; gathered written twice; row written; counters below
    counters = 4 * 3  # fusions read the index of the layer twice, its update once
    start = 64 * 128 * 2 + 4 + 4 * 8 * 128 * 2 + 4 * 8 * 4
    copy, reduced, scattered = 2 * 64 * 128 * 2, 64 * 128 * 2 + 48, 64 * 128 * 2 + 16 * 128 * 2
    total = hlo.hbm_bytes(TEXT)
    assert abs(total - (4 * each_layer + start + copy + reduced + scattered)) <= 4 * counters


@pytest.mark.parametrize("shape, size", [("f32[]", 4), ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048), ("(pred[3], /*index=1*/u8[2,2], s4[4])", 9), ("token[]", 0)])
def test_bytes_of_a_shape(shape, size):
    assert hlo.num_bytes(shape) == size
