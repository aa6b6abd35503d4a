"""The Triton backend's layout (`layout`), kernels (`kernels`) and choices by device (`choices`)."""
