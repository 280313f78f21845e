"""The ops as Triton kernels, for CUDA and ROCm. Imported only where one of them runs: Triton is an optional dependency.

A launcher reads shapes and never data, so that a step can be captured in a CUDA graph and a launch can be recorded on
meta tensors (`launch.recording`): ahead-of-time compilation, the resource report and the tests of launch choice see the
very launches that serving makes.
"""
