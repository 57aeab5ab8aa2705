"""The C++ twin of the sparse and packed linears (``csrc/kernels/linear.cpp`` and ``packed.cpp``); see `reference`."""
