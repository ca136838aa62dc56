"""Small programs as XLA prints them, written by hand."""

LOOP = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0: f32[3,100]) -> f32[3,100] {
  %param_0 = f32[3,100]{1,0:T(8,128)} parameter(0)
  ROOT %add.9 = f32[3,100]{1,0:T(8,128)} add(%param_0, %param_0)
}

%body.1 (p: (s32[], f32[3,100])) -> (s32[], f32[3,100]) {
  %p = (s32[]{:T(128)}, f32[3,100]{1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[3,100]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%count, %one)
  %twice = f32[3,100]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused_computation.1
  %sum = f32[3,100]{1,0:T(8,128)S(1)} all-reduce(%twice), channel_id=1, replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%plus, metadata={op_name="jit(step)/while/body/reduce_sum" stack_frame_id=1}
  ROOT %t = (s32[]{:T(128)}, f32[3,100]{1,0:T(8,128)}) tuple(%next, %twice)
}

%condition.1 (q: (s32[], f32[3,100])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %q = (s32[]{:T(128)}, f32[3,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%any_body (r: (pred[4])) -> (pred[4]) {
  %r = (pred[4]{0:T(512)}) parameter(0)
  %v = pred[4]{0:T(512)S(1)} get-tuple-element(%r), index=0
  %w = pred[4]{0:T(512)S(1)} not(%v)
  ROOT %u = (pred[4]{0:T(512)S(1)}) tuple(%w)
}

%any_condition (r2: (pred[4])) -> pred[] {
  %r2 = (pred[4]{0:T(512)}) parameter(0)
  %v2 = pred[4]{0:T(512)S(1)} get-tuple-element(%r2), index=0
  ROOT %any = pred[]{:T(512)S(6)} fusion(%v2), kind=kLoop, calls=%fused_any
}

%async_computation.1 (a: f32[64,256]) -> f32[16,256] {
  %a = f32[64,256]{1,0:T(8,128)} parameter(0)
  ROOT %part = f32[16,256]{1,0:T(8,128)S(1)} slice(%a), slice={[0:16], [0:256]}
}

ENTRY %main.7_spmd (param.1: (f32[3,100], f32[64,256])) -> (f32[3,100], f32[64,256]) {
  %param.1 = (f32[3,100]{1,0:T(8,128)}, f32[64,256]{1,0:T(8,128)}, pred[4]{0:T(512)}) parameter(0)
  %small = f32[3,100]{1,0:T(8,128)} get-tuple-element(%param.1), index=0
  %large = f32[64,256]{1,0:T(8,128)} get-tuple-element(%param.1), index=1
  %flags = pred[4]{0:T(512)} get-tuple-element(%param.1), index=2
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[3,100]{1,0:T(8,128)}) tuple(%zero, %small)
  %while.1 = (s32[]{:T(128)}, f32[3,100]{1,0:T(8,128)}) while(%start), condition=%condition.1, body=%body.1, metadata={op_name="jit(step)/while" stack_frame_id=2}
  %flagged = (pred[4]{0:T(512)}) tuple(%flags)
  %while.2 = (pred[4]{0:T(512)}) while(%flagged), condition=%any_condition, body=%any_body, metadata={op_name="jit(step)/shard_map/while"}
  %slice-start.1 = ((f32[64,256]{1,0:T(8,128)}), f32[16,256]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) async-start(%large), calls=%async_computation.1
  %slice-done.1 = f32[16,256]{1,0:T(8,128)S(1)} async-done(%slice-start.1)
  %copy-start.1 = (f32[64,256]{1,0:T(8,128)S(1)}, f32[64,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%large)
  %copy-done.1 = f32[64,256]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %half = bf16[64,256]{1,0:T(8,128)(2,1)} convert(%copy-done.1)
  %all-gather-start.1 = (bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[256,256]{1,0:T(8,128)(2,1)}) all-gather-start(%half), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  %all-gather-done.1 = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start.1)
  %update = f32[64,256]{1,0:T(8,128)} dynamic-update-slice(%large, %slice-done.1, %zero, %zero)
  ROOT %out = (f32[3,100]{1,0:T(8,128)}, f32[64,256]{1,0:T(8,128)}) tuple(%small, %update)
}
"""
