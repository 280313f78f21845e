"""The ops in C++ for CPUs. Sources and build: `kernels/native/`; the wrappers here pass addresses and sizes."""
