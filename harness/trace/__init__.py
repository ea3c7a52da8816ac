"""Observations of one call: launches, operators, memory, transfers; and Triton's interpreter, corrected.

Public: `Tracing` (tracing.py) records a call; `watching` and `shielding` (launches.py); `fence`, poison around tensors;
`guarding` (sanitizer.py), memory faults of interpreted kernels; `transfers`, `host_calls.count`; `same_bits` (bits.py);
`interpreter.enable`.

The harness patches code of other projects in these places:

    Triton  patch (module)                          why                                       test
    all     InterpreterBuilder.cast_impl, the       bf16 and fp8 round wrongly, tl.dot        trace/test_interpreter.py
            operators, create_dot, _convert_float   multiplies the bits of bf16
            (interpreter.py)
    all     create_masked_load (interpreter.py)     masked lanes are zeros, on a GPU          trace/test_sanitizer.py
                                                    undefined
    all     GridExecutor.__call__                   the position in the grid is global:       trace/test_interpreter.py
            (interpreter.py)                        two threads would share it
    all     create_erf, _get_np_dtype, block_type,  speed only                                trace/test_interpreter.py
            tensor, broadcast_impl_value,
            _patch_lang, sanitize_overflow
            (interpreter.py)
    all     operators of the builder,               memory faults that only other sizes       trace/test_sanitizer.py
            _implicit_cvt (sanitizer.py), while     show
            a kernel is guarded
    all     JITFunction.run,                        every launch goes through them; hooks     perf/test_structure.py
            InterpretedFunction.run (launches.py),  see no interpreted launch
            while a watcher is registered
    3.4     InterpretedFunction.run, __getitem__    3.4 has no such method                    perf/test_structure.py
            (launches.py)
    -       sendcommand of pytest-xdist             a dead worker ends the whole run          plugin/test_controller.py
            (plugin/controller.py)                  (pytest-xdist issue 204)
"""
